import copy
import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import pytest
import tiny
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from named_rewards import lambda_free_reward
from small import ROWS, Digits, Recorder, Rows, Same, adamw, equal, fit, module, trainer, weights
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lambdapo import (
    AdapterConfig,
    AlgorithmConfig,
    EvaluationConfig,
    LambdaPOModule,
    PolicyConfig,
    PromptBatch,
    RolloutConfig,
    SamplingConfig,
)
from lightning_lambdapo.rewards import Reward, SemanticDensityReward
from lightning_lambdapo.rollout import HFEngine


def test_a_step_logs_everything_and_nothing_is_nan(base: str, tmp_path: Path) -> None:
    settings = AlgorithmConfig(kl_coef=0.05)
    model = module(base, algorithm=settings, rewards=[Digits(), SemanticDensityReward(weight=0.5)])
    steps = fit(tmp_path, model)
    assert len(steps) == 4
    expected = {
        *("reward", "reward_std", "reward/digits", "reward/digits_std", "reward/semantic_density", "entropy", "kl"),
        *("completion_length", "truncated", "valid", "loss", "grad_norm", "lr", "clip_fraction", "ratio_max"),
        *("sampling_drift", "sampling_drift_max", "weight_q05", "weight_q50", "weight_q95", "weight_extreme_share"),
        *("group_auc", "group_sum", "equal_reward_share", "skipped_updates"),
        *("density_precision", "density_recall", "density_f", "empty_updates"),
    }
    for step in steps:
        assert {f"train/{name}" for name in expected} <= step.keys()
        has_spread = step["train/completion_length"] < step["train/completion_length_max"]
        assert ("train/advantage_length_correlation" in step) == has_spread, "equal lengths correlate with nothing"
        assert all(math.isfinite(value) for value in step.values())
    first = steps[0]
    parts = first["train/reward/digits"] + 0.5 * first["train/reward/semantic_density"]
    assert first["train/reward"] == pytest.approx(parts, rel=1e-5)
    assert first["train/density_f"] == pytest.approx(first["train/reward/semantic_density"], rel=1e-5)
    assert first["train/ratio_max"] == 1.0
    assert first["train/clip_fraction"] == 0.0
    assert first["train/kl"] == pytest.approx(0.0, abs=1e-6)
    assert steps[1]["train/kl"] > 1e-6
    assert first["train/sampling_drift_max"] < 1e-4
    assert "train/accuracy" not in first


def test_equal_rewards_leave_every_parameter_as_it_is(base: str, tmp_path: Path) -> None:
    """Not even momentum or weight decay may move one."""
    model = module(base)
    data = Rows(batch_size=4)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, data)
    assert run.global_step == 8
    before = weights(model)
    model.rewards = [Same(name="same")]
    run.fit_loop.max_epochs = 4
    run.fit(model, data)
    assert run.global_step == 16
    assert equal(weights(model), before)


def test_lora_moves_the_adapter_and_not_a_bit_of_the_base(base: str, tmp_path: Path) -> None:
    model = module(base, lora=AdapterConfig(r=4))
    model.configure_model()
    before = weights(model)
    fit(tmp_path, model)
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name}


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_8_bit_adamw(base: str, tmp_path: Path, quantization: Any) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        built: torch.optim.Optimizer = cast(Any, bitsandbytes.optim).AdamW8bit(parameters, lr=1e-2)
        return built

    model = module(
        base, lora=AdapterConfig(r=4), optimizer=optimizer, policy=PolicyConfig(base, quantization=quantization)
    )
    model.configure_model()
    before = weights(model)
    fit(tmp_path, model)
    assert any(not torch.equal(before[name], value) for name, value in weights(model).items() if "lora_B" in name)


def test_several_updates_per_rollout(base: str, tmp_path: Path) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=16)

    model = module(base, updates_per_rollout=4, epochs_per_rollout=2, lr_scheduler=schedule, max_grad_norm=None)
    recorder = Recorder()
    run = trainer(tmp_path, callbacks=[recorder], enable_checkpointing=True)
    run.fit(model, Rows(batch_size=4))
    assert run.global_step == 16
    assert model.rollout_step == 4
    assert [step["train/ratio_max"] > 1.01 for step in recorder.steps] == [True] * 4
    assert recorder.steps[0]["train/lr"] == pytest.approx(1e-2 * (1 + 15 / 16 + 14 / 16 + 13 / 16) / 4)


def test_gradient_clipping(base: str, tmp_path: Path) -> None:
    """SGD at rate 1 moves by exactly the clipped gradient."""
    model = module(base, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), max_grad_norm=1e-3)
    model.configure_model()
    before = weights(model)
    steps = fit(tmp_path, model, limit_train_batches=1)
    moved = torch.cat([(value - before[name]).flatten() for name, value in weights(model).items()])
    assert steps[0]["train/grad_norm"] > 1e-2
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_non_finite_gradients_are_skipped_then_an_error(base: str, tmp_path: Path) -> None:
    model = module(base, max_skipped_updates=2)
    model.configure_model()
    before = weights(model)

    def poison(gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, torch.nan)

    next(model.policy.parameters()).register_hook(poison)
    with pytest.raises(RuntimeError, match="3 updates in a row had a gradient norm of nan"):
        fit(tmp_path, model)
    assert model.run_state.skipped_updates == 3
    assert equal(weights(model), before)


@pytest.mark.parametrize("reward", [Digits(), Same(name="same")])
def test_float16_scaler_takes_updates_and_empty_updates(base: str, tmp_path: Path, reward: Reward) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model = module(base, rewards=[reward])
    model.configure_model()
    before = weights(model)
    run = trainer(tmp_path, plugins=MixedPrecision("16-mixed", device="cpu", scaler=scaler))
    run.fit(model, Rows(batch_size=4))
    assert run.global_step == 4
    assert equal(weights(model), before) == isinstance(reward, Same)
    assert scaler.is_enabled()


def test_bf16_mixed_trains(base: str, tmp_path: Path) -> None:
    model = module(base, lora=AdapterConfig(r=4), policy=PolicyConfig(base, dtype="bfloat16"))
    steps = fit(tmp_path, model, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
    assert all(math.isfinite(step["train/loss"]) for step in steps)


def test_evaluation_uses_its_own_decoding_and_repeats(base: str, tmp_path: Path) -> None:
    evaluation = EvaluationConfig(num_samples=3, k=[1, 3], max_new_tokens=5, sampling=SamplingConfig(temperature=0.7))
    model = module(base, validation=evaluation, rewards=None)
    data = Rows(batch_size=4)
    run = trainer(tmp_path, limit_val_batches=1.0)
    first = run.validate(model, data, verbose=False)[0]
    assert {
        "val/pass_at_1",
        "val/pass_at_3",
        "val/maj_at_3",
        "val/avg_at_3",
        "val/reward",
        "val/density_f",
    } <= first.keys()
    assert first["val/avg_at_3"] == pytest.approx(first["val/pass_at_1"])
    assert first["val/pass_at_3"] >= first["val/pass_at_1"]
    assert first["val/completion_length_max"] <= 5
    assert run.validate(model, data, verbose=False)[0] == first
    assert run.test(model, data, verbose=False)[0]["test/reward"] >= 0
    before = weights(model)
    run.fit(model, data)  # after inference mode
    assert not equal(weights(model), before)
    records = [record for batch in run.predict(model, data) or [] for record in batch]
    assert len(records) == 16 * 3
    assert [record["sample"] for record in records[:4]] == [0, 1, 2, 0]
    assert {"prompt_id", "prompt", "completion", "answer", "truncated"} <= records[0].keys()


def test_truncated_rows_can_be_masked(base: str, tmp_path: Path) -> None:
    model = module(base, algorithm=AlgorithmConfig(mask_truncated=True))
    steps = fit(tmp_path, model)
    assert any(0 < step["train/truncated"] < 1 for step in steps)
    for step in steps:
        assert step["train/valid"] == pytest.approx(1 - step["train/truncated"])


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_baselines_are_one_setting_away(base: str, tmp_path: Path, estimator: Any) -> None:
    steps = fit(tmp_path, module(base, algorithm=AlgorithmConfig(estimator=estimator)))
    assert "train/weight_q50" not in steps[0]
    assert steps[0]["train/group_sum"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 1.0}, "set `max_grad_norm` of LambdaPOModule"),
        ({"accumulate_grad_batches": 2}, "`max_tokens_per_micro_batch`"),
        ({"precision": "bf16-true"}, 'use precision="bf16-mixed" with `policy.dtype: bfloat16`'),
    ],
)
def test_trainer_settings_that_cannot_work(base: str, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module(base, lora=AdapterConfig(r=4)), **settings)


class Bare(Rows):
    """Rows without references."""

    def setup(self, stage: str) -> None:
        self._rows = {"train": [row | {"reference": None} for row in ROWS]}


class Frozen(LambdaPOModule):
    """A policy of which nothing is trained."""

    def build_policy(self) -> Any:
        return super().build_policy().requires_grad_(False)


def test_settings_are_refused_before_any_rollout(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`updates_per_rollout` \(3\) must be a positive multiple"):
        module(base, updates_per_rollout=3, epochs_per_rollout=2)
    with pytest.raises(ValueError, match=r"must be at least 1, got 0"):
        module(base, max_tokens_per_micro_batch=0)
    data = Bare(batch_size=4)
    with pytest.raises(ValueError, match=r"the 16 training rows"):
        trainer(tmp_path).fit(module(base, rewards=[SemanticDensityReward()]), data)
    frozen = Frozen(PolicyConfig(base), rewards=[Digits()])
    with pytest.raises(ValueError, match="has no trainable parameter"):
        fit(tmp_path, frozen)
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        fit(tmp_path, module(base, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau))
    many = module(base, updates_per_rollout=5)
    with pytest.raises(ValueError, match="5 mini-batches of a global batch of 4 prompts"):
        fit(tmp_path, many)
    with pytest.warns(UserWarning, match="drawn with top_k"):
        module(base, rollout=RolloutConfig(sampling=SamplingConfig(top_k=5)))
    with pytest.warns(UserWarning, match="k1.* has zero expected gradient"):
        module(base, algorithm=AlgorithmConfig(kl_coef=0.1, kl_estimator="k1"))


def test_it_lives_in_somebodys_own_project(base: str, tmp_path: Path) -> None:
    """Own policy by one hook, own loaders, own logger, Lightning's own callbacks."""
    from torch.utils.data import DataLoader

    from lightning_lambdapo import PromptCollator

    class OwnPolicy(LambdaPOModule):
        def build_policy(self) -> Any:
            policy = tiny.model("qwen3")
            policy.get_input_embeddings().requires_grad_(False)
            return policy

    model = OwnPolicy(
        PolicyConfig(base),
        rollout=RolloutConfig(group_size=3, max_new_tokens=6),
        rewards=[lambda_free_reward, Digits(weight=0.1)],
        optimizer=adamw,
    )
    rows = [{"prompt": row["prompt"], "shade": index} for index, row in enumerate(ROWS)]
    collator = PromptCollator(model.tokenizer, max_prompt_length=8)
    loader: DataLoader[PromptBatch] = DataLoader(rows, batch_size=4, collate_fn=collator, shuffle=True)  # type: ignore[arg-type]
    callbacks = [
        ModelCheckpoint(tmp_path / "best", monitor="val/reward", mode="max"),
        EarlyStopping("val/reward", mode="max", patience=3),
        LearningRateMonitor("step"),
    ]
    run = trainer(
        tmp_path,
        callbacks=callbacks,
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path),
        limit_val_batches=1.0,
        max_epochs=2,
    )
    run.fit(model, loader, DataLoader(rows, batch_size=8, collate_fn=collator))  # type: ignore[arg-type]
    assert run.global_step == 8
    assert list((tmp_path / "best").glob("*.ckpt"))
    assert "val/reward" in run.callback_metrics
    assert run.callback_metrics["train/reward/lambda_free_reward"] >= 0


def test_what_users_replace_is_what_the_next_step_uses(base: str, tmp_path: Path) -> None:
    """Engine, settings and limits are read when they are used, not copied when the run starts."""
    calls: list[int] = []

    class Counting(HFEngine):
        def generate(self, model: Any, batch: Any, **options: Any) -> Any:
            calls.append(options["uniforms"].shape[1])
            return super().generate(model, batch, **options)

    class Changes(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            model = cast(LambdaPOModule, pl_module)
            model.engine = Counting(model.tokenizer, (1,), 0)
            model.rollout_config = dataclasses.replace(model.rollout_config, max_new_tokens=3)
            model.max_grad_norm = 1e-6

    before: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            before.append(weights(pl_module))

    model = module(base, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), max_grad_norm=1.0)
    fit(tmp_path, model, callbacks=[Changes(), Watch()], max_steps=2)
    assert calls == [3]
    moved = sum(float((value - before[1][name]).square().sum()) for name, value in weights(model).items()) ** 0.5
    assert moved <= 1.1e-6


def test_a_policy_that_a_subclass_puts_in_place_is_the_one_that_samples(base: str, tmp_path: Path) -> None:
    class Other(LambdaPOModule):
        def configure_model(self) -> None:
            super().configure_model()
            with torch.no_grad():
                for parameter in self.policy.parameters():
                    parameter.mul_(0.5)
            self.policy = copy.deepcopy(self.policy)

    model = Other(PolicyConfig(base), rollout=RolloutConfig(group_size=4, max_new_tokens=8), rewards=[Digits()], seed=3)
    (step,) = fit(tmp_path, model, max_steps=1)
    assert step["train/sampling_drift_max"] < 1e-4


def test_a_step_of_validation_needs_no_trainer(base: str) -> None:
    model = module(base)
    model.configure_model()
    data = Rows(batch_size=4, tokenizer=model.tokenizer)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    for step in (model.validation_step, model.test_step):
        assert len(step(batch, 0)["outcomes"]) == 4


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_loader_without_the_collator_is_told_of_it(base: str, tmp_path: Path, stage: str) -> None:
    loader: DataLoader[Any] = DataLoader(cast(Any, ROWS), batch_size=4)
    with pytest.raises(TypeError, match=r"PromptBatch, got dict\. Give the DataLoader `collate_fn=PromptCollator\("):
        getattr(trainer(tmp_path, limit_val_batches=int(stage != "fit")), stage)(module(base), loader)


def test_the_name_of_a_model_is_no_policy(base: str) -> None:
    with pytest.raises(TypeError, match=r"A PolicyConfig is needed, got 'builtin:.*'\. Pass PolicyConfig\('builtin:"):
        LambdaPOModule(policy=cast(Any, "builtin:arithmetic"))
    with pytest.raises(TypeError, match=r"A RolloutConfig is needed, got None\. Pass RolloutConfig\(\.\.\.\)\."):
        module(base, rollout=None)
