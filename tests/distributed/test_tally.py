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


def test_float32_values_are_summed_in_float64() -> None:
    many = Tally()
    many.mean("x", torch.full((10_000,), 0.1))
    assert math.isclose(many.reduce()["x"], torch.tensor(0.1).item(), rel_tol=1e-12)


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
