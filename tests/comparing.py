"""Two runs of :mod:`fitting` compared by their files: the same within a tolerance, or to the bit."""

from pathlib import Path
from typing import Any

import fitting
import pytest
import torch
from torch import Tensor


def saved_weights(directory: Path) -> dict[str, Tensor]:
    """What a run ended with."""
    found: dict[str, Tensor] = torch.load(directory / "weights.pt", weights_only=True)
    return found


def assert_same(first: Path, second: Path, *, tolerance: float) -> None:
    """The same completions, token for token, and metrics and weights within a tolerance."""
    for alone, together in zip(fitting.completions(first), fitting.completions(second), strict=True):
        assert alone["completion"] == together["completion"]
        for name in ("step", "prompt_id", "sample", "completion_length", "truncated", "valid"):
            assert alone[name] == together[name], name
        for name in ("rewards", "total", "score", "advantage"):  # an encoder's batches differ, and so its rounding
            assert together[name] == pytest.approx(alone[name], rel=10 * tolerance, abs=tolerance), name
    expected, found = fitting.metrics(first), fitting.metrics(second)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        wanted = pytest.approx(value, rel=10 * tolerance, abs=tolerance)
        assert found[key] == wanted or "drift" in key[1], key
    for name, weight in saved_weights(first).items():
        torch.testing.assert_close(saved_weights(second)[name], weight, rtol=0, atol=tolerance)


def same(first: Any, second: Any) -> bool:
    """Equal to the bit, through all nesting."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[name]) for name, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def assert_same_run(whole: Path, resumed: Path, first: int) -> None:
    """The resumed part has the uninterrupted run's rollouts and metrics, and ends in the very same state.

    It begins with the validation after step ``first``, where there is one, which the checkpoint came before.
    """
    number = 1
    expected = {
        (record["step"], record["prompt_id"], record["sample"]): record for record in fitting.completions(whole)
    }
    found = fitting.completions(resumed, number)
    assert found
    assert max(record["step"] for record in found) == 12
    for record in found:
        assert record == expected[record["step"], record["prompt_id"], record["sample"]]
    logged, known = fitting.metrics(resumed, number), fitting.metrics(whole)
    assert {step for step, _ in logged} == set(range(min(step for step, _ in logged), 12))
    assert {key: known.get(key) for key in logged} == logged
    assert min(step for step, name in logged if name.startswith("train/")) == first
    assert {key for key in known if key[0] >= first} <= logged.keys()
    assert ((first - 1, "val/reward") in logged) == ((first - 1, "val/reward") in known)
    last, final = (
        torch.load(fitting.checkpoint(path, number=n), weights_only=True) for path, n in ((whole, 0), (resumed, number))
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "lambdapo", "epoch", "global_step"):
        assert same(last[part], final[part]), part
    assert same(
        torch.load(whole / "weights.pt", weights_only=True), torch.load(resumed / "weights.pt", weights_only=True)
    )
