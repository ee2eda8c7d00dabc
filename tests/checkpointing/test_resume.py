"""A run killed at any moment and resumed from its last checkpoint is the uninterrupted run, bit for bit."""

from pathlib import Path
from typing import Any

import fitting
import pytest
import torch
from comparing import assert_same_run, same
from ranks import on_ranks, succeed

pytestmark = pytest.mark.slow
VALIDATES = {"val_check_interval": 2}  # within epochs too


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run of a kind on a number of ranks, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(how: str, kind: str) -> Path:
        if (how, kind) not in made:
            directory = tmp_path_factory.mktemp(f"{how}-{kind}")
            count = 1 if how == "one" else 2
            options: dict[str, Any] = {"how": how, "kind": kind, "trainer": VALIDATES}
            succeed(on_ranks(count, fitting.train, directory, base, logs=directory / "logs", **options))
            made[how, kind] = directory
        return made[how, kind]

    return get


@pytest.mark.parametrize(
    ("how", "kind", "death", "last"),
    [
        ("one", "dropout", "rollout 4", 2),  # mid-epoch, in a rollout
        ("one", "full", "learning 7", 6),  # mid-epoch, gradients half accumulated
        ("one", "nf4", "update 6", 4),  # resumed exactly at an epoch's end
        ("one", "dropout", "validation 6", 6),  # in the first of two batches
        ("one", "dropout", "validation 8", 8),
        ("one", "dropout", "epoch_end 8", 8),  # killed exactly at an epoch's end
        ("one", "dropout", "rollout 12", 10),  # in the third epoch, shuffled
        ("ddp", "dropout", "rollout 4", 2),
        ("ddp", "full", "epoch_end 8", 8),
        ("ddp", "dropout", "rollout 11 SIGKILL 1", 10),  # one of the ranks alone
        ("fsdp", "dropout", "rollout 11", 10),
        ("shards", "dropout", "learning 7", 6),
        ("fsdp1", "dropout", "learning 7", 6),
    ],
)
def test_killed_and_resumed_is_the_uninterrupted_run(
    whole: Any, base: str, tmp_path: Path, how: str, kind: str, death: str, last: int
) -> None:
    count = 1 if how == "one" else 2
    start: dict[str, Any] = {"how": how, "kind": kind, "trainer": VALIDATES}
    ended = on_ranks(count, fitting.train, tmp_path, base, death=death, logs=tmp_path / "killed", **start)
    killed = [each for each in ended if each.code == -9]
    assert len(killed) == (count if "SIGKILL" not in death else 1), [each.log[-2000:] for each in ended]
    assert all(each.code != 0 for each in ended)
    assert fitting.checkpoint(tmp_path).exists()
    shards = how in ("shards", "fsdp1")
    assert fitting.checkpoint(tmp_path).is_dir() == shards
    if not shards:
        held = torch.load(fitting.checkpoint(tmp_path), weights_only=True)
        assert held["lambdapo"]["rollout_step"] == last
    succeed(on_ranks(count, fitting.train, tmp_path, base, resume="last", logs=tmp_path / "resumed", **start))
    if shards:  # the state is the same if what is made of it is
        uninterrupted = whole("fsdp" if how == "shards" else how, kind)
        expected, found = fitting.completions(uninterrupted), fitting.completions(tmp_path, 1)
        assert found == [record for record in expected if record["step"] > last]
        assert same(*(torch.load(path / "weights.pt", weights_only=True) for path in (uninterrupted, tmp_path)))
    else:
        assert_same_run(whole(how, kind), tmp_path, last)


def test_killed_in_the_last_validation(whole: Any, base: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trainer": VALIDATES}
    (ended,) = on_ranks(1, fitting.train, tmp_path, base, death="validation 12", logs=tmp_path / "killed", **options)
    assert ended.code == -9
    succeed(on_ranks(1, fitting.train, tmp_path, base, resume="last", logs=tmp_path / "resumed", **options))
    known = fitting.metrics(whole("one", "dropout"))
    last = {key: value for key, value in known.items() if key[0] == 11 and not key[1].startswith("train/")}
    assert fitting.metrics(tmp_path, 1) == last
    assert "val/reward" in {name for _, name in last}


@pytest.mark.parametrize("limit", [{}, {"max_epochs": -1, "max_steps": 24}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("moment", "saved"), [("rollout 7", 7), ("rollout 8", 8), ("validation 6", 6), ("validation 8", 8)]
)
def test_sigterm_saves_at_the_end_of_the_step(
    whole: Any, base: str, tmp_path: Path, moment: str, saved: int, limit: dict[str, int]
) -> None:
    """In validation, and in an epoch's last step, at the end of a validation batch. All of it is repeated."""
    options: dict[str, Any] = {"every": 12, "trainer": VALIDATES | limit}
    start: dict[str, Any] = {"death": f"{moment} SIGTERM", "save_on_exception": True} | options
    (ended,) = on_ranks(1, fitting.train, tmp_path, base, logs=tmp_path / "killed", **start)
    assert ended.code != 0
    assert "SIGTERMException" in ended.log
    assert torch.load(fitting.checkpoint(tmp_path), weights_only=True)["lambdapo"]["rollout_step"] == saved
    succeed(on_ranks(1, fitting.train, tmp_path, base, resume="last", logs=tmp_path / "resumed", **options))
    assert_same_run(whole("one", "dropout"), tmp_path, saved)


@pytest.mark.parametrize("rank", ["0", "1", "all"])
@pytest.mark.parametrize("save", [True, False])
def test_sigterm_ends_both_ranks_after_the_same_step(
    whole: Any, base: str, tmp_path: Path, rank: str, save: bool
) -> None:
    death: dict[str, Any] = {"death": f"rollout 7 SIGTERM {rank}", "save_on_exception": save}
    options: dict[str, Any] = {"how": "ddp", "trainer": VALIDATES}
    ended = on_ranks(2, fitting.train, tmp_path, base, logs=tmp_path / "killed", **options, **death)
    assert all("SIGTERMException" in each.log for each in ended), [each.log[-2000:] for each in ended]
    held = torch.load(fitting.checkpoint(tmp_path), weights_only=True)
    assert held["lambdapo"]["rollout_step"] == (7 if save else 6)
    succeed(on_ranks(2, fitting.train, tmp_path, base, resume="last", logs=tmp_path / "resumed", **options))
    assert_same_run(whole("ddp", "dropout"), tmp_path, 7 if save else 6)
