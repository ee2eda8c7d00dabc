"""Micro-batches that run out of memory are repeated, smaller. Where that cannot be, the message says what to do."""

from pathlib import Path
from typing import Any

import fitting
import pytest
import torch
from ranks import on_ranks, succeed
from small import Digits, Rows, finite_fit, module, trainer, weights

from lightning_lambdapo import AdapterConfig
from lightning_lambdapo.distributed import parallel
from lightning_lambdapo.learning.learner import Learner


class Scarce:
    """Makes micro-batches of more than some tokens run out of memory, in the forward or in the backward pass."""

    def __init__(self, most: int, where: str, rank: int | None = None) -> None:
        self.most, self.where, self.rank = most, where, rank

    def __call__(self, original: Any, learner: Any, update: Any, micro_batch: Any, *arguments: Any) -> Any:
        loss = original(learner, update, micro_batch, *arguments)
        if micro_batch.input_ids.numel() <= self.most or self.rank not in (None, parallel.rank()):
            return loss
        if self.where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        loss.register_hook(self.fail)
        return loss

    def fail(self, gradient: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.filterwarnings("ignore:A micro-batch ran out of memory")
def test_memory_that_runs_out_halves_the_micro_batches(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ample = module(base, lora=AdapterConfig(r=4), max_tokens_per_micro_batch=400)
    expected = finite_fit(tmp_path, ample)
    original, scarce = Learner._loss, Scarce(100, where)
    monkeypatch.setattr(Learner, "_loss", lambda *arguments: scarce(original, *arguments))
    model = module(base, lora=AdapterConfig(r=4), max_tokens_per_micro_batch=400)
    steps = finite_fit(tmp_path, model)
    assert steps[-1]["train/memory_retries"] in (1, 2)
    assert model.learner.max_tokens == 400 // 2 ** steps[-1]["train/memory_retries"]
    for found, step in zip(steps, expected, strict=True):
        others = {name: value for name, value in step.items() if name != "train/memory_retries"}
        assert {name: found[name] for name in others} == pytest.approx(others, rel=1e-4, abs=1e-5)
    for name, value in weights(ample).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:A micro-batch ran out of memory")
def test_nothing_of_the_attempt_that_failed_is_left(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first micro-batch has added its gradient, and its statistics, when the second runs out of memory."""
    expected = finite_fit(tmp_path, module(base, max_tokens_per_micro_batch=100))
    original, calls = Learner._loss, [0]

    def second_fails(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*arguments)

    monkeypatch.setattr(Learner, "_loss", second_fails)
    steps = finite_fit(tmp_path, module(base, max_tokens_per_micro_batch=100))
    assert steps[0]["train/memory_retries"] == 1
    for name in ("train/grad_norm", "train/loss", "train/sampling_drift"):
        assert steps[0][name] == pytest.approx(expected[0][name], rel=1e-3, abs=1e-6), name


def test_a_row_that_does_not_fit_alone(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, scarce = Learner._loss, Scarce(2, "forward")
    monkeypatch.setattr(Learner, "_loss", lambda *arguments: scarce(original, *arguments))
    with (
        pytest.warns(UserWarning, match=r"A micro-batch ran out of memory\. From now on"),
        pytest.raises(torch.OutOfMemoryError, match="A single row of the learning pass does not fit in memory"),
    ):
        trainer(tmp_path).fit(module(base, max_tokens_per_micro_batch=64), Rows(batch_size=4))


def train_scarcely(directory: Path, base: str, **options: Any) -> None:
    """A run whose rank 1 is short of memory."""
    fitting.wrap(Learner, "_loss", Scarce(25, "backward", rank=1))
    fitting.train(directory, base, **options)


@pytest.mark.slow
def test_one_rank_that_is_short_of_memory_starts_over_by_itself(base: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"how": "ddp", "kind": "lora64", "validate": False, "rewards": [Digits()]}
    options["max_tokens_per_micro_batch"] = 200
    for name, function in (("ample", fitting.train), ("scarce", train_scarcely)):
        succeed(on_ranks(2, function, tmp_path / name, base, logs=tmp_path / f"{name}-logs", **options))
    assert fitting.metrics(tmp_path / "scarce")[11, "train/memory_retries"] >= 1
    assert fitting.metrics(tmp_path / "ample")[11, "train/memory_retries"] == 0
    first, second = fitting.completions(tmp_path / "ample"), fitting.completions(tmp_path / "scarce")
    assert [record["completion"] for record in first] == [record["completion"] for record in second]
    both = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("ample", "scarce")]
    for name, value in both[0].items():
        torch.testing.assert_close(both[1][name], value, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_ranks_that_hold_shards_stop_with_a_message(base: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"how": "fsdp", "kind": "lora64", "validate": False}
    ended = on_ranks(2, train_scarcely, tmp_path, base, logs=tmp_path / "logs", **options)
    assert all(each.code != 0 for each in ended)
    assert "Rank 1 ran out of memory in the learning pass. Ranks that hold shards cannot start over" in ended[1].log
