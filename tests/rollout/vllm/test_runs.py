"""Runs with vLLM in each rank: any number of ranks, resumed after a kill, and served by servers."""

from pathlib import Path
from typing import Any

import fitting
import pytest
from comparing import assert_same, saved_weights
from ranks import on_ranks, succeed
from small import Digits
from torch.testing import assert_close

from lightning_lambdapo import RolloutConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LIMITS: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 1}
OPTIONS: dict[str, Any] = {
    "rollout": RolloutConfig(group_size=4, max_new_tokens=8, engine="vllm"),
    "rewards": [Digits()],
    "trainer": LIMITS,
}


@pytest.fixture(scope="module")
def one(served: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one rank, by what is trained."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            succeed(
                on_ranks(
                    1, fitting.train, made[kind], served, kind=kind, logs=made[kind] / "logs", timeout=200, **OPTIONS
                )
            )
        return made[kind]

    return get


@pytest.mark.parametrize(("how", "kind"), [("ddp", "lora"), ("fsdp", "full"), ("fsdp1", "lora")])
def test_two_ranks_train_the_run_of_one(one: Any, served: str, tmp_path: Path, how: str, kind: str) -> None:
    """The same tokens. Each rank has an engine, which gets whole weights also where ranks hold shards."""
    succeed(
        on_ranks(2, fitting.train, tmp_path, served, how=how, kind=kind, logs=tmp_path / "logs", timeout=300, **OPTIONS)
    )
    assert_same(one(kind), tmp_path, tolerance=2e-4)
    drift = [value for (_, name), value in fitting.metrics(tmp_path).items() if name == "train/sampling_drift"]
    assert len(drift) == 8
    assert max(drift) < 1e-4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_killed_and_resumed_is_the_uninterrupted_run(one: Any, served: str, tmp_path: Path, kind: str) -> None:
    start: dict[str, Any] = {"kind": kind, "timeout": 200, **OPTIONS}
    (ended,) = on_ranks(1, fitting.train, tmp_path, served, death="learning 6", logs=tmp_path / "killed", **start)
    assert ended.code == -9, ended.log[-3000:]
    succeed(on_ranks(1, fitting.train, tmp_path, served, resume="last", logs=tmp_path / "resumed", **start))
    expected = [record for record in fitting.completions(one(kind)) if record["step"] > 4]
    found = fitting.completions(tmp_path, 1)
    assert [record["completion"] for record in found] == [record["completion"] for record in expected]
    for name, weight in saved_weights(one(kind)).items():
        assert_close(saved_weights(tmp_path)[name], weight, rtol=0, atol=2e-4)
