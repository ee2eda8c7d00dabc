import json
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import FSDP1
from safetensors.torch import load_file
from test_module import ROWS, Digits, Rows, equal, module, trainer, weights
from torch.distributed.tensor import DTensor

from lightning_lambdapo import (
    AdapterConfig,
    CompletionsLogger,
    LambdaPOModule,
    PolicyConfig,
    PolicyExport,
    RewardPlot,
    RolloutCheckpoint,
    RolloutConfig,
    Throughput,
)
from lightning_lambdapo.functional import lambda_advantages
from lightning_lambdapo.rewards import Reward, RewardInputs


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_completions_hold_everything_that_made_the_advantage(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = CompletionsLogger(every_n_rollouts=2, table_every_n_rollouts=3)
    trainer(tmp_path, callbacks=[callback]).fit(module(base), Rows(batch_size=4))
    records = read(tmp_path / "completions.jsonl")
    assert [record["step"] for record in records] == [2] * 16 + [4] * 16
    prompts = {row["prompt_id"]: row["prompt"] for row in ROWS}
    for start in range(0, 32, 4):
        group = records[start : start + 4]
        assert {prompts[record["prompt_id"]] for record in group} == {group[0]["prompt"]}
        assert [record["sample"] for record in group] == [0, 1, 2, 3]
        rewards = torch.tensor([[record["total"] for record in group]])
        scores = torch.tensor([[record["score"] for record in group]])
        expected = lambda_advantages(rewards, scores)[0].tolist()
        assert [record["advantage"] for record in group] == pytest.approx(expected, abs=1e-6)
        for record in group:
            text = record["completion"]
            assert record["rewards"]["digits"] == pytest.approx(sum(map(str.isdigit, text)) / max(len(text), 1))
            assert record["valid"]
    assert "step 3" in capsys.readouterr().out


def test_an_earlier_runs_files_are_never_written_over(base: str, tmp_path: Path) -> None:
    for _ in range(2):
        callbacks = [CompletionsLogger(every_n_rollouts=4), RewardPlot()]
        trainer(tmp_path, callbacks=callbacks).fit(module(base), Rows(batch_size=4))
    assert len(read(tmp_path / "completions.jsonl")) == len(read(tmp_path / "completions-1.jsonl")) == 16
    assert (tmp_path / "reward.png").exists()
    assert (tmp_path / "reward-1.png").exists()


def test_predictions_go_to_jsonl(base: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[CompletionsLogger()])
    run.predict(module(base), Rows(batch_size=4))
    records = read(tmp_path / "predictions.jsonl")
    assert [record["prompt_id"] for record in records] == [row["prompt_id"] for row in ROWS]
    assert {"prompt", "completion", "answer", "truncated", "completion_length"} <= records[0].keys()


def test_throughput_and_curves(base: str, tmp_path: Path) -> None:
    plot = RewardPlot(every_n_rollouts=2, metrics=("train/reward", "val/reward", "train/nothing"))
    run = trainer(tmp_path, callbacks=[plot, Throughput()], logger=CSVLogger(tmp_path), limit_val_batches=1.0)
    run.fit(module(base), Rows(batch_size=4))
    assert run.callback_metrics["train/tokens_per_second"] > 0
    curves = plot.state_dict()["curves"]
    assert [step for step, _ in curves["train/reward"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves["val/reward"]] == [4]
    again = RewardPlot()
    again.load_state_dict(json.loads(json.dumps(plot.state_dict())))
    assert again.state_dict() == plot.state_dict()
    assert (tmp_path / "lightning_logs" / "version_0" / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_by_time(base: str, tmp_path: Path) -> None:
    for name, interval, count in (("often", timedelta(0), 4), ("rarely", timedelta(hours=1), 0)):
        callback = RolloutCheckpoint(train_time_interval=interval, dirpath=tmp_path / name, save_top_k=-1)
        run = trainer(tmp_path, callbacks=[callback], enable_checkpointing=True)
        run.fit(module(base), Rows(batch_size=4))
        assert len(list((tmp_path / name).glob("rollout-*.ckpt"))) == count


def test_checkpoints_of_the_best(base: str, tmp_path: Path) -> None:
    callback = RolloutCheckpoint(
        every_n_rollouts=1, dirpath=tmp_path, monitor="train/reward", mode="max", filename="{step}"
    )
    run = trainer(tmp_path, callbacks=[callback], enable_checkpointing=True)
    short = RolloutConfig(max_new_tokens=16)
    model = LambdaPOModule(policy=module(base).policy_config, rollout=short, rewards=[Digits()], seed=3)
    run.fit(model, Rows(batch_size=4))
    assert callback.best_model_score is not None
    assert Path(callback.best_model_path).exists()


class Falling(LambdaPOModule):
    """Logs, in place of what validation measures, how many rollouts its weights come from."""

    breaks = False

    def on_validation_start(self) -> None:
        if self.breaks:
            raise RuntimeError("broken")

    def on_validation_epoch_end(self) -> None:
        self.log("val/rollouts", float(self.rollout_step))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the resumed run saves elsewhere, on purpose
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the broken one in its own place
def test_the_best_by_validation_are_the_weights_that_were_validated(base: str, tmp_path: Path) -> None:
    """A save is due at every step, validation after every second of four; the first is the best."""

    def fit(
        name: str, ckpt_path: str | None = None, monitor: str = "val/rollouts", breaks: bool = False
    ) -> tuple[LambdaPOModule, RolloutCheckpoint]:
        callback = RolloutCheckpoint(every_n_rollouts=1, dirpath=tmp_path / name, monitor=monitor, mode="min")
        every = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1}
        model = Falling(policy=PolicyConfig(base), rollout=RolloutConfig(max_new_tokens=8), rewards=[Digits()], seed=3)
        model.breaks = breaks
        run = trainer(tmp_path, callbacks=[callback], enable_checkpointing=True, **every)
        run.fit(model, Rows(batch_size=4), ckpt_path=ckpt_path)
        return model, callback

    model, callback = fit("whole")
    best = torch.load(callback.best_model_path, weights_only=True)
    assert best["global_step"] == best["callbacks"][callback.state_key]["best_model_score"] == 2
    assert torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["global_step"] == 4
    resumed, _ = fit("resumed", callback.best_model_path)
    assert equal(weights(resumed), weights(model))
    # Interrupted before the first validation's end, and taken up.
    with pytest.raises(RuntimeError, match="broken"):
        fit("broken", breaks=True)
    again, callback = fit("broken", str(tmp_path / "broken" / "last.ckpt"))
    assert callback.best_model_score == 2
    assert equal(weights(again), weights(model))
    with pytest.raises(MisconfigurationException, match=r"monitor='val/accuracy'\)` could not find the"):
        fit("mistaken", monitor="val/accuracy")
    last = torch.load(tmp_path / "mistaken" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2, "saved before the first validation, which found the mistake"


def test_the_best_by_what_few_steps_log(base: str, tmp_path: Path) -> None:
    """Saves are due after the second and the fourth of four steps."""

    class Some(Reward):
        """Has a value in every second call."""

        def __init__(self, name: str, first: bool) -> None:
            super().__init__(1.0, name)
            self.next = first

        def __call__(self, inputs: RewardInputs) -> list[float | None]:
            self.next = not self.next
            return [None if self.next else 1.0 for _ in inputs.completions]

    every: dict[str, Any] = {"val_check_interval": 4, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    for name, saves in (("odd", False), ("even", True), ("none", False)):
        monitor = f"train/reward/{name}"
        callback = RolloutCheckpoint(every_n_rollouts=2, dirpath=tmp_path / monitor, monitor=monitor, mode="max")
        model = module(base, rewards=[Digits(), Some("odd", True), Some("even", False)])
        run = trainer(tmp_path, callbacks=[callback], enable_checkpointing=True, **every)
        with nullcontext() if saves else pytest.warns(UserWarning, match=f"monitor='{monitor}'\\) saved no best"):
            run.fit(model, Rows(batch_size=4))
        assert bool(callback.best_model_path) == saves
        assert (tmp_path / monitor / "last.ckpt").exists()


@pytest.mark.parametrize("lora", [None, AdapterConfig(r=4)], ids=["full", "lora"])
def test_sharded_weights_are_gathered_for_the_export(base: str, tmp_path: Path, lora: AdapterConfig | None) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    model = module(base, lora=lora)
    trainer(tmp_path, strategy=strategy, callbacks=[PolicyExport()]).fit(model, Rows(batch_size=4))
    held = load_file(tmp_path / "export" / ("adapter_model.safetensors" if lora else "model.safetensors"))
    assert held
    for name, parameter in model.policy.named_parameters():
        exported = held.get(name.replace(".default", ""))
        assert (exported is not None) == (lora is None or "lora_" in name), name
        if exported is not None:
            torch.testing.assert_close(exported, cast(DTensor, parameter).full_tensor().detach(), rtol=0, atol=0)


def test_flattened_weights_are_not_exported(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot gather the shards of FSDP1"):
        trainer(tmp_path, strategy=FSDP1(), callbacks=[PolicyExport()]).fit(module(base), Rows(batch_size=4))


@pytest.mark.parametrize("settings", [{"every_n_rollouts": 0}, {"table_every_n_rollouts": -1}])
def test_bad_settings(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        CompletionsLogger(**settings)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RewardPlot(every_n_rollouts=0)
