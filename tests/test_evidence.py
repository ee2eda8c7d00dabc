"""What the evidence was made with computes what its docstrings say."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small import Rows, module, trainer
from torch import Tensor

from lightning_lambdapo import AlgorithmConfig
from lightning_lambdapo.functional import group_advantages, lambda_advantages
from lightning_lambdapo.rewards import LengthPenalty

DIRECTORY = Path(__file__).parents[1] / "configs" / "evidence"
ESTIMATORS = ["win_rate", "rank_gap", "undecided", "optimistic", "rare_first", "best_peer", "Annealed"]


@pytest.fixture(scope="module")
def variants() -> Any:
    """The module as ``PYTHONPATH=configs/evidence`` finds it."""
    spec = importlib.util.spec_from_file_location("variants", DIRECTORY / "variants.py")
    assert spec is not None
    assert spec.loader is not None
    found: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["variants"] = found
    spec.loader.exec_module(found)
    yield found
    del sys.modules["variants"]


def estimator(variants: Any, name: str) -> Any:
    found = getattr(variants, name)
    return found() if isinstance(found, type) else found


def slow(name: str, rewards: list[float], confidence: list[float]) -> list[float]:
    """The formula, with loops over one group."""
    size = len(rewards)
    mean = sum(confidence) / size
    spread = math.sqrt(sum((value - mean) ** 2 for value in confidence) / size)
    wins = [[1 / (1 + math.exp((other - own) / spread)) for other in confidence] for own in confidence]
    ranks = [sum(other < own for other in rewards) + rewards.count(own) / 2 for own in rewards]
    softmax = [math.exp(value / spread) / sum(math.exp(other / spread) for other in confidence) for value in confidence]

    def weight(i: int, j: int) -> float:
        if name == "rank_gap":
            return abs(ranks[i] - ranks[j]) / (size - 1)
        if name == "undecided":
            return 4 * wins[i][j] * wins[j][i]
        if name == "optimistic":
            return wins[i][j] if rewards[i] > rewards[j] else 0.5
        if name == "Annealed":  # its first call
            return wins[i][j]
        return 1 - softmax[i]

    found = []
    for i in range(size):
        others = [j for j in range(size) if j != i]
        if name == "win_rate":
            signs = [(rewards[i] > rewards[j]) - (rewards[i] < rewards[j]) for j in others]
            found.append(sum(signs) / len(others))
        elif name == "best_peer":
            found.append(max(0.0, rewards[i] - max(rewards[j] for j in others)))
        else:
            found.append(sum(weight(i, j) * (rewards[i] - rewards[j]) for j in others) / len(others))
    return found


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variants_follow_their_formula(variants: Any, name: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.25, 1.0, 0.5], [0.0, 0.5, 0.0, 0.0, 0.0]], dtype=dtype)
    confidence = torch.tensor([[-0.1, -0.5, -0.3, -0.9, -0.2], [-1.0, -0.5, -0.2, -0.7, -0.1]], dtype=dtype)
    found = estimator(variants, name)(rewards, confidence, torch.ones(2, 5, dtype=torch.bool))
    expected = [slow(name, *each) for each in zip(rewards.tolist(), confidence.tolist(), strict=True)]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_invalid_rows_are_nobodys_peers(variants: Any, name: str) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.25, 0.0, 0.5]])
    confidence = torch.tensor([[-0.1, -0.5, -0.3, 0.0, -0.2]])
    valid = torch.tensor([[True, True, True, False, True]])
    found = estimator(variants, name)(rewards, confidence, valid)[valid]
    alone = estimator(variants, name)(rewards[valid][None], confidence[valid][None], torch.ones(1, 4, dtype=torch.bool))
    scale = 3 / 4 if name == "rank_gap" else 1.0  # its gaps are shares of the whole group
    torch.testing.assert_close(found, alone[0] * scale)


def test_annealed_goes_from_confidence_to_uniform(variants: Any) -> None:
    rewards, confidence = torch.tensor([[1.0, 0.0, 0.25]]), torch.tensor([[-0.1, -0.5, -0.3]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    annealed = variants.Annealed(steps=2)
    first, middle, last, later = (annealed(rewards, confidence, valid) for _ in range(4))
    torch.testing.assert_close(first, lambda_advantages(rewards, confidence, weighting="confidence"))
    torch.testing.assert_close(last, group_advantages(rewards, estimator="rloo") / 2)
    torch.testing.assert_close(middle, (first + last) / 2)
    assert torch.equal(last, later)


def test_every_update_has_the_length_asked_for(variants: Any) -> None:
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.full((2,), 2.0))]
    optimizer = variants.FixedNormAdamW(weights, norm=0.1, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    for length in (0.05, 0.075, 0.1):
        before = [weight.detach().clone() for weight in weights]
        weights[0].grad, weights[1].grad = torch.tensor([3.0, -4.0, 0.0]), torch.tensor([1e-3, 5.0])
        optimizer.step()
        schedule.step()
        change: list[Tensor] = [new.detach() - old for new, old in zip(weights, before, strict=True)]
        assert math.sqrt(sum(float(each.square().sum()) for each in change)) == pytest.approx(length, rel=1e-4)
        assert (change[0][:2].sign() == torch.tensor([-1.0, 1.0])).all()
    for weight in weights:
        weight.grad = None
    before = [weight.detach().clone() for weight in weights]
    optimizer.step()
    assert all(torch.equal(new, old) for new, old in zip(weights, before, strict=True))


def test_a_weight_follows_its_schedule(variants: Any, base: str, tmp_path: Path) -> None:
    class Weights(Callback):
        found: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.found.append(pl_module.rewards[0].weight)

    recorder = Weights()
    schedule = variants.WeightSchedule(reward="length", start=1.0, end=0.5, steps=2)
    model = module(base, rewards=[LengthPenalty(max_length=8, buffer=4, name="length")])
    trainer(tmp_path, callbacks=[schedule, recorder]).fit(model, Rows(batch_size=4))
    assert recorder.found == [1.0, 0.75, 0.5, 0.5]


def test_variants_train_by_their_import_path(variants: Any, base: str, tmp_path: Path) -> None:
    model = module(base, algorithm=AlgorithmConfig(estimator="variants.win_rate"))
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, Rows(batch_size=4))
    assert math.isfinite(run.callback_metrics["train/loss"])
