import itertools
import math
import statistics
from typing import Any

import pytest
import torch

from lightning_lambdapo.distributed import parallel, tally
from lightning_lambdapo.distributed.tally import Tally


def ranks(monkeypatch: pytest.MonkeyPatch, *tallies: Tally) -> dict[str, float]:
    """Reduce the tallies of several ranks as the first of them would see it."""
    parts: list[Any] = []

    def gather(value: Any) -> list[Any]:
        parts.append(value)
        return parts

    monkeypatch.setattr(tally, "gather_objects", gather)
    for each in tallies[1:]:
        each.reduce()
    return tallies[0].reduce()


def test_means_are_over_rows_and_not_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = Tally(), Tally(), Tally()
    first.mean_and_std("reward", torch.tensor([1.0, 2.0, 6.0]))
    second.mean_and_std("reward", torch.tensor([5.0]))
    first.ratio("kl", 3.0, 10)
    second.maximum("ratio_max", torch.tensor([1.5, 1.25]))
    first.maximum("ratio_max", torch.tensor([1.0]))
    third.mean("reward", torch.tensor([]))
    second.total("tokens", 7)
    third.total("tokens", 5)
    second.total("tokens", 1)
    third.mean("nothing", torch.tensor([]))
    third.maximum("nothing_max", torch.tensor([]))
    values = ranks(monkeypatch, first, second, third)
    everything = [1.0, 2.0, 6.0, 5.0]
    assert values == {
        "reward": statistics.mean(everything),
        "reward_std": pytest.approx(statistics.stdev(everything)),
        "kl": 0.3,
        "ratio_max": 1.5,
        "tokens": 13,
    }


def test_a_single_value_has_no_standard_deviation() -> None:
    one = Tally()
    one.mean_and_std("reward", torch.tensor([2.0]))
    assert one.reduce() == {"reward": 2.0}


def test_the_effective_share_is_that_of_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights 1, 3 on one rank and 2, 0 on another: (1 + 3 + 2 + 0)^2 / (4 * (1 + 9 + 4)) = 36 / 56."""
    first, second, third = Tally(), Tally(), Tally()
    first.effective_share("ess", 1.0, 1.0, 1)
    part = Tally()
    part.effective_share("ess", 3.0, 9.0, 1)
    first.merge(part)
    second.effective_share("ess", 2.0, 4.0, 2)
    third.effective_share("ess", 0.0, 0.0, 0)
    assert ranks(monkeypatch, first, second, third) == {"ess": pytest.approx(36 / 56)}
    none, nothing = Tally(), Tally()
    none.effective_share("ess", 0.0, 0.0, 3)
    assert ranks(monkeypatch, none) == {"ess": 0.0}
    nothing.effective_share("ess", 0.0, 0.0, 0)
    assert ranks(monkeypatch, nothing) == {}
    nothing.effective_share("ess", 1.0, 1.0, 1)
    nothing.clear()
    assert ranks(monkeypatch, nothing) == {}


def test_float32_values_are_summed_in_float64() -> None:
    many = Tally()
    many.mean("x", torch.full((10_000,), 0.1))
    assert math.isclose(many.reduce()["x"], torch.tensor(0.1).item(), rel_tol=1e-12)


@pytest.mark.parametrize("order", list(itertools.permutations([1.0, math.nan, 3.0])))
@pytest.mark.parametrize("split", [0, 1, 2, 3])
def test_no_maximum_hides_a_value_that_is_no_number(
    monkeypatch: pytest.MonkeyPatch, order: tuple[float, ...], split: int
) -> None:
    """In one call, in several, merged, or over ranks, wherever the NaN is."""
    together, one_by_one, first, second = (Tally() for _ in range(4))
    together.maximum("x", torch.tensor(order))
    for value in order:
        one_by_one.maximum("x", torch.tensor(value))
    first.maximum("x", torch.tensor(order[:split]))
    second.maximum("x", torch.tensor(order[split:]))
    merged = Tally()
    merged.merge(first)
    merged.merge(second)
    for tallied in (together, one_by_one, merged):
        assert math.isnan(tallied.reduce()["x"])
    assert math.isnan(ranks(monkeypatch, first, second)["x"])
    for tallied in (first, second):
        tallied.clear()
        tallied.maximum("x", torch.tensor([-2.0, -5.0]))
    assert ranks(monkeypatch, first, second) == {"x": -2.0}


def test_the_global_deviation_is_that_of_the_values_under_every_default_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Trainer(precision="bf16-true")`` makes bfloat16 the default type while a step runs."""
    shares = [[1.001, 2.0], [1.003, 1.002]]
    monkeypatch.setattr(parallel, "gather_objects", lambda _: shares)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = parallel.global_std(torch.tensor(shares[0], dtype=torch.float64))
    finally:
        torch.set_default_dtype(default)
    assert found.item() == pytest.approx(statistics.stdev([1.001, 2.0, 1.003, 1.002]), rel=1e-12)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_occurrences_are_counted_in_the_order_of_the_global_batch(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    order = [7, 8, 7, 7, 9, 8]
    shares = [order[rank::world] for rank in range(world)]
    monkeypatch.setattr(parallel, "gather_objects", lambda _: shares)
    found: list[Any] = [None] * len(order)
    for rank in range(world):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        found[rank::world] = parallel.global_occurrences(shares[rank])
    assert found == [0, 0, 1, 2, 0, 1]
