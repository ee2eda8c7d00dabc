"""The same seed on the same machine gives the same bits."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fitting
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from small import equal, weights

from lightning_lambdapo import DataSource, LambdaPODataModule
from lightning_lambdapo.distributed.seeding import step_randomness
from lightning_lambdapo.rewards import Reward, RewardInputs


class Dice(Reward):
    """Random by every generator there is."""

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        return [random.random() + np.random.rand() + float(torch.rand(())) for _ in inputs.completions]


@pytest.mark.parametrize("kind", ["dropout", "full"])
def test_twice_the_same_bits(base: str, tmp_path: Path, kind: str) -> None:
    """Whatever state the generators were in before."""
    found = []
    for name in ("first", "second"):
        random.seed(name)
        np.random.seed(len(name))
        torch.manual_seed(len(name))
        model = fitting.train(tmp_path / name, base, kind=kind, rewards=[Dice()], trainer={"max_epochs": 1})
        found.append((weights(model), fitting.completions(tmp_path / name), fitting.metrics(tmp_path / name)))
    assert equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_another_seed_is_another_run(base: str, tmp_path: Path) -> None:
    for seed in (3, 4):
        fitting.train(tmp_path / str(seed), base, seed=seed, trainer={"max_epochs": 1})
    first, second = (fitting.completions(tmp_path / str(seed)) for seed in (3, 4))
    assert [record["completion"] for record in first] != [record["completion"] for record in second]


def test_deterministic_algorithms_are_enough(base: str, tmp_path: Path) -> None:
    class Looks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

    seen: list[bool] = []
    try:
        fitting.train(tmp_path, base, trainer={"max_epochs": 1, "deterministic": True}, callbacks=[Looks()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [True] * 4


def test_a_steps_randomness_is_its_own_and_leaves_no_trace() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = draw(), draw()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = draw()
    with step_randomness(3, 7):
        inside = draw()
    assert (before, draw()) == expected
    with step_randomness(3, 7):
        assert draw() == inside
    for key in ((3, 8), (4, 7), (7, 3)):
        with step_randomness(*key):
            assert all(first != second for first, second in zip(draw(), inside, strict=True))


def test_ranks_draw_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr("lightning_lambdapo.distributed.seeding.rank", lambda rank=rank: rank)
        with step_randomness(3, 7):
            drawn.append(float(torch.rand(())))
    assert drawn[0] != drawn[1]


def test_every_seed_is_in_the_log(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    data = LambdaPODataModule(train=DataSource(preset="arithmetic", size=16, seed=5), batch_size=4, seed=9)
    fitting.train(tmp_path, base, data=data, validate=False, seed=None, trainer={"max_steps": 2})
    logged = yaml.safe_load((fitting.version(tmp_path) / "hparams.yaml").read_text())
    seeds = {name: value for name, value in logged.items() if name.startswith("seed/")}
    assert seeds == {"seed/global": 11, "seed/sampling": 11, "seed/data_order": 9, "seed/data_train": 5}
