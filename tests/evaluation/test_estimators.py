"""Intervals against scipy, exact binomials and resampling by hand; accuracy of single prompts by enumeration."""

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from lightning_lambdapo.evaluation.estimators import estimate, majority_is_right, pass_at_k


def test_two_prompts_by_hand() -> None:
    """A resample of 0 and 1 has the mean 0, 1/2 or 1 with probability 1/4, 1/2 and 1/4."""
    found = estimate([0.0, 1.0])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    middle = estimate([0.0, 1.0], confidence=0.4)
    assert (middle.low, middle.high) == (0.5, 0.5)


@pytest.mark.parametrize(("prompts", "right"), [(4, 1), (10, 3), (20, 8), (35, 30), (60, 1)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_shares_have_the_quantiles_of_a_binomial(prompts: int, right: int, confidence: float) -> None:
    share = right / prompts
    mass = [math.comb(prompts, i) * share**i * (1 - share) ** (prompts - i) for i in range(prompts + 1)]
    cumulative = list(itertools.accumulate(mass))
    found = estimate([1.0] * right + [0.0] * (prompts - right), resamples=40_000, confidence=confidence)
    for level, end in (((1 - confidence) / 2, found.low), ((1 + confidence) / 2, found.high)):
        near = [i for i, total in enumerate(cumulative) if total >= level - 0.006]  # 0.006: Monte Carlo error, 3 sigma
        sure = [i for i, total in enumerate(cumulative) if total >= level + 0.006]
        assert end is not None
        assert near[0] <= round(end * prompts, 6) <= sure[0]


@pytest.mark.parametrize("seed", range(3))
def test_against_scipy(seed: int) -> None:
    stats: Any = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(seed)
    sums = generator.gamma(2.0, 50.0, size=40)
    counts = generator.integers(1, 9, size=40)
    for data, arguments, spread in (
        ((sums,), (sums,), sums.std() / math.sqrt(40)),
        ((sums, counts), (sums, counts), (sums - sums.sum() / counts.sum() * counts).std() / counts.mean() / 6.3),
    ):

        def ratio(s: Any, c: Any = None, axis: int = -1) -> Any:
            return s.sum(axis) / (s.shape[axis] if c is None else c.sum(axis))

        expected = stats.bootstrap(
            data, ratio, n_resamples=20_000, paired=True, vectorized=True, method="percentile", rng=generator
        ).confidence_interval
        found = estimate(*(list(map(float, values)) for values in arguments), resamples=20_000)
        assert found.value == pytest.approx(float(ratio(*data)))
        assert found.low == pytest.approx(expected.low, abs=0.12 * spread)  # four times the Monte Carlo error
        assert found.high == pytest.approx(expected.high, abs=0.12 * spread)


def test_prompts_are_drawn_not_rows() -> None:
    """Half of 100 rows are right, but all of one prompt and none of the other: that says next to nothing."""
    found = estimate([50, 0], [50, 50])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_prompts_weigh_by_their_rows() -> None:
    assert estimate([3, 0], [4, 1]).value == 0.6
    assert estimate([0.75, 0.0]).value == 0.375


def test_the_order_of_prompts_does_not_matter_and_the_seed_does() -> None:
    values = [random.Random(0).random() for _ in range(50)]
    counts = [i % 5 for i in range(50)]
    pairs = list(zip(values, counts, strict=True))
    random.Random(1).shuffle(pairs)
    assert estimate(values, counts) == estimate(*map(list, zip(*pairs, strict=True)))
    assert estimate(values, counts) != estimate(values, counts, seed=1)
    assert estimate(values, counts) == estimate(*map(list, zip(*(pair for pair in pairs if pair[1]), strict=True)))


def test_many_prompts_are_drawn_in_parts() -> None:
    values = [float(i % 2) for i in range(3000)]
    found = estimate(values, resamples=1000)  # 349 resamples at once
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.5 / math.sqrt(3000), abs=0.003)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.5 / math.sqrt(3000), abs=0.003)


def test_one_prompt_has_no_interval() -> None:
    assert (estimate([3.0], [4]).low, estimate([3.0, 9.0], [4, 0]).high) == (None, None)
    assert estimate([3.0, 9.0], [4, 0]).value == 0.75


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ([], None, "no prompt"),
        ([1.0], [0], "no prompt"),
        ([1.0, math.nan], None, "must be finite"),
        ([1.0], [math.inf], "must be finite"),
        ([1.0, 2.0], [1], "Give one of each per prompt"),
    ],
)
def test_bad_data(sums: list[float], counts: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(sums, counts)


def test_pass_at_k_by_enumeration() -> None:
    for samples, k in itertools.product(range(1, 7), range(1, 7)):
        for right in range(samples + 1) if k <= samples else ():
            draws = list(itertools.combinations(range(samples), k))
            expected = sum(min(draw) < right for draw in draws) / len(draws)  # the first `right` samples are correct
            assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("votes", "correct", "expected"),
    [
        ([0, 1, 1], [True, False, False], False),
        ([0, 1, 1], [False, True, True], True),
        ([0, 1], [True, False], True),  # a tie: the first
        ([0, 1], [False, True], False),
        ([None, None, 0], [False, False, True], True),  # None is no answer that could win
        ([None, None], [False, False], False),
        ([0, 0, 1], [False, True, False], True),  # one spelling of the winner was accepted
    ],
)
def test_majority_votes(votes: list[int | None], correct: list[bool], expected: bool) -> None:
    assert majority_is_right(votes, correct) is expected
