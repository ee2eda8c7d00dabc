"""When checkpoints are saved, and which is the best."""

import csv
import inspect
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Digits, Rows, equal, module, trainer, weights

from lightning_lambdapo import LambdaPOModule, PolicyConfig, RolloutCheckpoint, RolloutConfig
from lightning_lambdapo.commands.main import main
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


def test_every_setting_of_the_parent_can_be_configured() -> None:
    ours = inspect.signature(RolloutCheckpoint.__init__).parameters
    theirs = inspect.signature(ModelCheckpoint.__init__).parameters
    assert set(theirs) - set(ours) == {"every_n_train_steps", "every_n_epochs"}
    assert not any(each.kind is each.VAR_KEYWORD for each in ours.values())
    own = {"filename", "save_last"}
    shared = [name for name in theirs if name in ours and name not in own]
    assert {name: ours[name].default for name in shared} == {name: theirs[name].default for name in shared}
    with pytest.raises(TypeError, match="every_n_epochs"):
        RolloutCheckpoint(every_n_rollouts=1, every_n_epochs=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("how", ["file", "options"])
def test_checkpoints_as_configured(arguments: list[str], tmp_path: Path, how: str) -> None:
    """Four rollouts, the two of the best reward are kept, by their own name in their own place."""
    settings = {
        "every_n_rollouts": 1,
        "monitor": "train/reward",
        "mode": "max",
        "save_top_k": 2,
        "filename": "best-{step}",
        "dirpath": str(tmp_path / "best"),
        "save_last": False,
        "save_on_exception": True,
        "save_weights_only": True,
        "auto_insert_metric_name": False,
    }
    callback = "lightning_lambdapo.RolloutCheckpoint"
    if how == "file":
        file = tmp_path / "checkpoints.yaml"
        entry = {"class_path": callback, "init_args": settings}
        file.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
        more = [f"--config={file}"]
    else:
        more = [f"--trainer.callbacks+={callback}"]
        more += [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]
    reward = "[{class_path: small.Digits}]"
    limits = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", f"--model.rewards={reward}"]
    main(["fit", *arguments, *limits, *more])
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as rows:
        rewards = [float(row["train/reward"]) for row in csv.DictReader(rows)]
    ranked = sorted(range(4), key=lambda step: rewards[step], reverse=True)
    assert len(set(rewards)) == 4
    assert {file.name for file in (tmp_path / "best").iterdir()} == {f"best-{step + 1}.ckpt" for step in ranked[:2]}
    held = torch.load(tmp_path / "best" / f"best-{ranked[0] + 1}.ckpt", weights_only=True)
    assert "optimizer_states" not in held


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("mode=upwards", "`trainer.callbacks.mode` must be one of 'min', 'max', got 'upwards'."),
        ("save_top_k=all", "`trainer.callbacks.save_top_k` must be a whole number, got 'all'."),
        ("every_n_epochs=1", "There is no setting `trainer.callbacks.every_n_epochs`."),
    ],
)
def test_mistaken_settings(
    arguments: list[str], setting: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--trainer.callbacks+=lightning_lambdapo.RolloutCheckpoint", f"--trainer.callbacks.{setting}"]
    with pytest.raises(SystemExit):
        main(["fit", *arguments, *more])
    assert sentence in capsys.readouterr().err


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
    # Interrupted before the first validation's end, and resumed.
    with pytest.raises(RuntimeError, match="broken"):
        fit("broken", breaks=True)
    again, callback = fit("broken", str(tmp_path / "broken" / "last.ckpt"))
    assert callback.best_model_score == 2
    assert equal(weights(again), weights(model))
    with pytest.raises(
        MisconfigurationException, match=r"monitor='val/accuracy'\) saved no .* Logged are .*val/rollouts"
    ):
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
