from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import PeftModel
from small import Digits, Recorder, Rows, adamw, config_file, equal, module, trainer, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_lambdapo import AdapterConfig, LambdaPOModule, PolicyConfig, PolicyExport, RolloutCheckpoint
from lightning_lambdapo.checkpointing import pending_validation
from lightning_lambdapo.commands.main import main

pytestmark = [
    # Lightning says so of every run that resumes into a directory of its own, or with other callbacks.
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)


def run(
    path: Path, base: str, *, every: int = 100, resume: str | None = None, **settings: Any
) -> tuple[LambdaPOModule, list[dict[str, float]], Trainer]:
    """Three epochs of four shuffled batches."""
    lora = settings.pop("lora", None)
    model = module(base, lora=lora, lr_scheduler=cosine)
    recorder = Recorder()
    callbacks = [RolloutCheckpoint(every_n_rollouts=every, dirpath=path, save_top_k=-1), recorder]
    built = trainer(path, callbacks=callbacks, enable_checkpointing=True, **({"max_epochs": 3} | settings))
    built.fit(model, Rows(batch_size=4), ckpt_path=resume)
    return model, recorder.steps, built


@pytest.mark.parametrize("lora", [None, AdapterConfig(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("at", [1, 4, 6, 8], ids=lambda at: f"rollout{at}")
def test_a_resumed_run_goes_on_bit_for_bit(base: str, tmp_path: Path, at: int, lora: Any) -> None:
    """Mid-epoch, exactly at an epoch's end, and in a later epoch, with shuffling and a schedule."""
    whole, steps, _ = run(tmp_path / "whole", base, lora=lora)
    assert len(steps) == 12
    run(tmp_path / "first", base, lora=lora, every=at, max_steps=at)
    checkpoint = tmp_path / "first" / f"rollout-step={at}.ckpt"
    torch.manual_seed(99)
    resumed, more, built = run(tmp_path / "second", base, lora=lora, resume=str(checkpoint))
    assert len(more) == 12 - at
    assert more == steps[at:]
    assert equal(weights(resumed), weights(whole))
    assert (resumed.rollout_step, built.global_step) == (12, 12)


@pytest.mark.parametrize("release", ["this", "earlier"])
def test_a_run_that_resumes_at_the_end_of_every_epoch(
    base: str, tmp_path: Path, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains as many epochs as the uninterrupted run, and no epoch too many. Before, Lightning miscounted them."""
    whole, steps, _ = run(tmp_path / "whole", base)
    if release == "earlier":
        monkeypatch.setattr(pending_validation, "begin_next_epoch", lambda _: None)
    seen: list[dict[str, float]] = []
    for epochs in (1, 2, 3, 3):
        last = tmp_path / "parts" / "last.ckpt"
        resumed, more, built = run(
            tmp_path / "parts", base, every=2, max_epochs=epochs, resume=str(last) if epochs > 1 else None
        )
        seen += more
        assert (resumed.rollout_step, built.current_epoch) == (4 * epochs, epochs)
    assert seen == steps
    assert equal(weights(resumed), weights(whole))


def test_checkpoints_hold_what_is_trained_and_load_weights_only(base: str, tmp_path: Path) -> None:
    model, _, _ = run(tmp_path, base, every=4, max_epochs=1, lora=AdapterConfig(r=4))
    checkpoint = torch.load(tmp_path / "rollout-step=4.ckpt", weights_only=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(checkpoint["state_dict"]) == trained
    assert all("lora_" in name for name in trained)
    assert checkpoint["hyper_parameters"]["policy"]["model"] == base
    assert "rewards" not in checkpoint["hyper_parameters"]
    noted = checkpoint["lambdapo"].pop("policy")
    assert noted["adapter"] == {"lora_alpha": 32}
    assert noted["base"]
    optimizer = checkpoint["lambdapo"].pop("optimizer")
    assert optimizer["class"] == "torch.optim.adamw.AdamW"
    assert [(group["lr"], group["weight_decay"]) for group in optimizer["groups"]] == [(1e-2, 0.1)]
    assert checkpoint["lambdapo"].pop("given_in_python") == {
        "rewards": "small.Digits",
        "optimizer": "small.adamw",
        "lr_scheduler": f"{__name__}.cosine",
    }
    assert checkpoint["lambdapo"] == {
        "version": 1,
        "rollout_step": 4,
        "skipped_updates": 0,
        "skipped_in_a_row": 0,
        "updates_in_unfinished_step": 0,
        "seed": 3,
        "owes_validation": False,
        "streams": 2,
    }
    assert (tmp_path / "last.ckpt").exists()


class Saving(Callback):
    """Saves at many moments, and notes whether a validation is pending then."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "now.ckpt"
        self.pending: dict[str, list[bool]] = {}

    def _save(self, trainer: Trainer, moment: str) -> None:
        trainer.save_checkpoint(self.file)
        held = torch.load(self.file, weights_only=True)["lambdapo"]["owes_validation"]
        self.pending.setdefault(f"{trainer.state.fn and trainer.state.fn.value} {moment}", []).append(held)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "step")

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation's start")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation's batch")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation's end")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "epoch")


def test_when_a_validation_is_pending(base: str, tmp_path: Path) -> None:
    """Four steps, a validation of two batches after every second, and one outside of training."""
    saving = Saving(tmp_path)
    often: dict[str, Any] = {"val_check_interval": 2, "limit_val_batches": 2, "num_sanity_val_steps": 1}
    built, model, data = trainer(tmp_path, callbacks=[saving], **often), module(base), Rows(batch_size=4)
    data.eval_batch_size = 4
    built.fit(model, data)
    built.validate(model, datamodule=data, verbose=False)
    assert saving.pending == {
        "fit step": [False, True, False, True],
        "fit validation's start": [True, True],
        "fit validation's batch": [True, True, True, True],
        "fit validation's end": [False, False],
        "fit epoch": [False],
        "validate validation's start": [False],
        "validate validation's batch": [False, False],
        "validate validation's end": [False],
    }


@pytest.mark.parametrize("lora", [None, AdapterConfig(r=4)], ids=["full", "lora"])
def test_load_from_checkpoint_of_a_module_built_in_python(base: str, tmp_path: Path, lora: Any) -> None:
    model, _, _ = run(tmp_path, base, every=4, max_epochs=1, lora=lora)
    live: dict[str, Any] = {"rewards": [Digits()], "optimizer": adamw, "lr_scheduler": cosine}
    again = LambdaPOModule.load_from_checkpoint(tmp_path / "rollout-step=4.ckpt", **live)
    assert equal(weights(again), weights(model))
    assert again.rollout_config == model.rollout_config
    assert again.lora == model.lora
    assert again.rollout_step == 4


def reward_of_mine(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


class WithRewards(LambdaPOModule):
    """Has rewards of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**(settings | {"rewards": [Digits()]}))


def test_what_was_given_in_python_must_be_given_again(base: str, tmp_path: Path) -> None:
    """Warnings are errors in these tests."""
    live: dict[str, Any] = {"rewards": [reward_of_mine, Digits()], "optimizer": sgd, "lr_scheduler": cosine}
    file = saved_by(tmp_path / "live", LambdaPOModule(PolicyConfig(base), **live))
    all_of_them = (
        rf"made in Python with `rewards` \({__name__}\.reward_of_mine, small\.Digits\), `optimizer` "
        rf"\({__name__}\.sgd\), `lr_scheduler` \({__name__}\.cosine\), which .*"
        r"load_from_checkpoint\(path, rewards=\.\.\., optimizer=\.\.\., lr_scheduler=\.\.\.\)"
    )
    with pytest.warns(UserWarning, match=all_of_them) as told:
        loaded = LambdaPOModule.load_from_checkpoint(file)
    assert len(told) == 1
    assert [reward.name for reward in loaded.rewards] == ["accuracy"]
    with pytest.warns(UserWarning, match=rf"made in Python with `optimizer` \({__name__}\.sgd\), which"):
        LambdaPOModule.load_from_checkpoint(file, rewards=[Digits()], lr_scheduler=cosine)
    again = LambdaPOModule.load_from_checkpoint(file, **live)
    assert again.optimizer_factory is sgd
    with pytest.warns(UserWarning, match="made in Python with `optimizer`"):
        WithRewards.load_from_checkpoint(file, lr_scheduler=cosine)


def test_defaults_need_not_be_given_again(base: str, tmp_path: Path) -> None:
    file = saved_by(tmp_path, LambdaPOModule(PolicyConfig(base)))
    assert "given_in_python" not in torch.load(file, weights_only=True)["lambdapo"]
    LambdaPOModule.load_from_checkpoint(file)


def saved_by(path: Path, model: LambdaPOModule) -> Path:
    """A checkpoint of a module that was validated and not trained."""
    built = trainer(path, limit_val_batches=1)
    built.validate(model, Rows(batch_size=4), verbose=False)
    built.save_checkpoint(path / "one.ckpt")
    return path / "one.ckpt"


def saved(path: Path, version: int = 0) -> Path:
    return path / "lightning_logs" / f"version_{version}" / "checkpoints" / "last.ckpt"


def test_load_from_checkpoint_of_a_module_built_by_the_cli(base: str, tmp_path: Path) -> None:
    main(["fit", "--config", str(config_file(base, tmp_path))])
    held = torch.load(saved(tmp_path), weights_only=True)["state_dict"]
    again = LambdaPOModule.load_from_checkpoint(saved(tmp_path))
    assert equal({name: value for name, value in weights(again).items() if name in held}, held)
    assert again.lora == AdapterConfig(r=4, alpha=8)
    assert again.policy_config == PolicyConfig(base)
    (reward,) = again.rewards
    assert (reward.name, reward.weight) == ("length", 0.5)


def test_a_resumed_command_line_keeps_its_own_settings(base: str, tmp_path: Path) -> None:
    """LightningCLI by default lets a checkpoint's hyper-parameters override file and command line."""
    file = config_file(base, tmp_path)
    main(["fit", "--config", str(file)])
    more = ["--trainer.max_epochs=2", "--model.max_grad_norm=0.123", f"--ckpt_path={saved(tmp_path)}"]
    main(["fit", "--config", str(file), *more])
    checkpoint = torch.load(saved(tmp_path, 1), weights_only=True)
    assert checkpoint["lambdapo"]["rollout_step"] == 8
    parameters = checkpoint["hyper_parameters"]
    assert parameters.get("max_grad_norm", parameters.get("init_args", {}).get("max_grad_norm")) == 0.123
    assert saved(tmp_path, 0).exists()


def test_checkpoints_of_something_else_are_refused(base: str, tmp_path: Path) -> None:
    run(tmp_path, base, every=4, max_epochs=1, lora=AdapterConfig(r=4))
    path = tmp_path / "rollout-step=4.ckpt"
    with pytest.raises(
        ValueError,
        match=r"rollout-step=4.ckpt cannot be used: it is for another policy: 21 trainable tensors are missing",
    ):
        LambdaPOModule.load_from_checkpoint(path, lora=None)
    with pytest.raises(ValueError, match=r"28 have another shape .*lora_A"):
        LambdaPOModule.load_from_checkpoint(path, lora=AdapterConfig(r=2))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lambdapo"]["version"] = 99
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    with pytest.raises(ValueError, match=r"newer\.ckpt cannot be used: it has format version 99, this release reads 1"):
        LambdaPOModule.load_from_checkpoint(tmp_path / "newer.ckpt")
    del checkpoint["lambdapo"]
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign\.ckpt cannot be used: this is not a checkpoint of LambdaPOModule"):
        LambdaPOModule.load_from_checkpoint(tmp_path / "foreign.ckpt")


def test_a_resume_with_another_seed_warns(base: str, tmp_path: Path) -> None:
    run(tmp_path, base, every=4, max_epochs=1)
    other = module(base, seed=4)
    built = trainer(tmp_path, max_epochs=2)
    with pytest.warns(UserWarning, match="sampled with seed 3, this one with 4"):
        built.fit(other, Rows(batch_size=4), ckpt_path=tmp_path / "rollout-step=4.ckpt")


def test_the_export_reproduces_the_policy(base: str, tmp_path: Path) -> None:
    ids = torch.tensor([[3, 9, 14, 22]])

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(ids).logits
            return found

    for name, lora in (("lora", AdapterConfig(r=4)), ("full", None)):
        model = module(base, lora=lora)
        trainer(tmp_path / name, callbacks=[PolicyExport()]).fit(model, Rows(batch_size=4))
        export = tmp_path / name / "export"
        start = base if lora else export
        again: Any = AutoModelForCausalLM.from_pretrained(start)
        untrained = logits(AutoModelForCausalLM.from_pretrained(base))
        if lora:
            again = PeftModel.from_pretrained(again, str(export))
        torch.testing.assert_close(logits(again), logits(model.policy.eval()))
        assert not torch.allclose(logits(again), untrained)
        assert (export / "tokenizer.json").exists()


@pytest.mark.parametrize("settings", [{}, {"every_n_rollouts": 0}, {"every_n_rollouts": 2, "train_time_interval": 1}])
def test_bad_checkpoint_settings(settings: Any) -> None:
    with pytest.raises(ValueError, match="every_n_rollouts"):
        RolloutCheckpoint(**settings)


def test_saves_are_counted_in_rollouts_not_updates(base: str, tmp_path: Path) -> None:
    model = module(base, updates_per_rollout=3, epochs_per_rollout=3, optimizer=adamw)
    callback = RolloutCheckpoint(every_n_rollouts=2, dirpath=tmp_path, save_top_k=-1)
    trainer(tmp_path, callbacks=[callback], enable_checkpointing=True).fit(model, Rows(batch_size=4))
    found = {
        path.name: torch.load(path, weights_only=True)["lambdapo"]["rollout_step"] for path in tmp_path.glob("r*.ckpt")
    }
    assert found == {"rollout-step=2.ckpt": 2, "rollout-step=4.ckpt": 4}
