"""When checkpoints are saved, and which is the best."""

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from small import Digits, Rows, equal, module, trainer, weights

from lightning_lambdapo import LambdaPOModule, PolicyConfig, RolloutCheckpoint, RolloutConfig
from lightning_lambdapo.rewards import Reward, RewardInputs


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
