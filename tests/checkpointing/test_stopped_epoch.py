"""A run that stopped within an epoch, and is resumed with a later end, is the run that had that end at once."""

from pathlib import Path
from typing import Any

import fitting
import pytest
import torch
from comparing import same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lambdapo.checkpointing.stopped_epoch import reopen

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
VALIDATES = {"val_check_interval": 2}
UPDATES = 2  # in each step


class Stop(Callback):
    """Ends training early, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.rollout_step == self.step:
            trainer.should_stop = True


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of four steps, without a stop."""
    directory = tmp_path_factory.mktemp("whole")
    fitting.train(directory, base, trainer=VALIDATES)
    return directory


def assert_continues(whole: Path, resumed: Path, number: int, first: int) -> None:
    """A resumed run has the rollouts, the metrics and the end of the uninterrupted one, from a step on."""
    expected = [record for record in fitting.completions(whole) if record["step"] > first]
    assert fitting.completions(resumed, number) == expected
    known, found = fitting.metrics(whole), fitting.metrics(resumed, number)
    assert {key: value for key, value in known.items() if key[0] >= first} == found
    assert same(*(torch.load(path / "weights.pt", weights_only=True) for path in (whole, resumed)))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6, 7, 11])
@pytest.mark.parametrize("saved_by", ["RolloutCheckpoint", "ModelCheckpoint"])
def test_more_steps_than_before(whole: Path, base: str, tmp_path: Path, step: int, saved_by: str) -> None:
    """Saved when training ends, or when the epoch ends. Steps 2 and 6 end with a validation, and 4 with the epoch."""
    plain = ModelCheckpoint(dirpath=tmp_path / "plain", filename="end", save_on_train_epoch_end=True)
    fitting.train(tmp_path, base, every=100, callbacks=[plain], trainer=VALIDATES | {"max_steps": step * UPDATES})
    file = {"RolloutCheckpoint": fitting.checkpoint(tmp_path), "ModelCheckpoint": tmp_path / "plain" / "end.ckpt"}
    assert torch.load(file[saved_by], weights_only=True)["global_step"] == step * UPDATES
    fitting.train(tmp_path, base, every=100, resume=str(file[saved_by]), trainer=VALIDATES)
    assert_continues(whole, tmp_path, 1, step)


def test_two_stops_in_one_epoch(whole: Path, base: str, tmp_path: Path) -> None:
    for number, step in enumerate((5, 6, 7)):
        stop: dict[str, Any] = {"callbacks": [Stop(step)]} if step == 6 else {}
        limit = {} if step == 6 else {"max_steps": step * UPDATES}
        resume = str(fitting.checkpoint(tmp_path, number=number - 1)) if number else None
        fitting.train(tmp_path, base, every=100, resume=resume, trainer=VALIDATES | limit, **stop)
    fitting.train(tmp_path, base, every=100, resume=str(fitting.checkpoint(tmp_path, number=2)), trainer=VALIDATES)
    assert_continues(whole, tmp_path, 3, 7)


def test_the_same_end_trains_nothing(base: str, tmp_path: Path) -> None:
    limit = {"max_steps": 3 * UPDATES}
    fitting.train(tmp_path, base, every=100, validate=False, trainer=limit)
    model = fitting.train(tmp_path, base, every=100, validate=False, resume="last", trainer=limit)
    assert model.rollout_step == 3


def test_other_checkpoints_stay_as_they_are(base: str, tmp_path: Path) -> None:
    """Those of a step, and those of an epoch's end."""
    fitting.train(tmp_path, base, every=1, trainer={"max_steps": 4 * UPDATES}, validate=False)
    files = list((fitting.version(tmp_path) / "checkpoints").glob("rollout-*.ckpt"))
    assert len(files) == 4
    for file in files:
        held = torch.load(file, weights_only=True)
        again = torch.load(file, weights_only=True)
        reopen(again)
        assert same(again["loops"], held["loops"])
    reopen({})
