"""pass@k and majority vote of one prompt's samples, and statistics over prompts with bootstrap intervals."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
_DRAWN_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic and its bootstrap interval.

    Attributes:
        value: the statistic of the data.
        low: lower end of the interval. None with fewer than two prompts.
        high: upper end of the interval.
    """

    value: float
    low: float | None
    high: float | None


def pass_at_k(samples: int, correct: int, k: int) -> float:
    r"""Unbiased pass@k of one prompt: the probability that at least one of ``k`` samples is correct.

    .. math:: 1 - \binom{n - c}{k} / \binom{n}{k}

    Source: Chen et al. 2021, arXiv 2107.03374.

    Args:
        samples: ``n``, at least ``k``.
        correct: ``c`` of them.
        k: number of samples drawn without replacement.

    Example:
        >>> pass_at_k(4, 1, 2)
        0.5
    """
    # A product of ratios, each in [0, 1], because binomial coefficients could overflow.
    return 1 - math.prod(max(samples - correct - i, 0) / (samples - i) for i in range(k))


def majority_is_right(votes: Sequence[object], correct: Sequence[bool]) -> bool:
    """Whether the most frequent answer of one prompt's samples is correct.

    None does not vote. A tie goes to the answer that came first. Without a vote, the result is False. The answer is
    correct where a sample that voted for it is. Source: self-consistency, Wang et al. 2022, arXiv 2203.11171.

    Example:
        >>> majority_is_right(["7", "9", "9"], [False, True, True])
        True
        >>> majority_is_right(["9", "7", None], [False, True, False])
        False
    """
    ballots = Counter(vote for vote in votes if vote is not None)
    if not ballots:
        return False
    winner = ballots.most_common(1)[0][0]  # most_common keeps the order of first appearance among equals
    return any(right for vote, right in zip(votes, correct, strict=True) if vote == winner)


def estimate(
    sums: Sequence[float],
    counts: Sequence[float] | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    r"""A mean over prompts, or over all their rows, with a percentile bootstrap interval over prompts.

    .. math:: \sum_i s_i / \sum_i c_i

    Prompts, not rows, are drawn with replacement, because the samples of one prompt are not independent. The order of
    the prompts has no effect. Source: Efron and Tibshirani 1993, chapter 13.

    Args:
        sums: :math:`s_i` of each prompt.
        counts: :math:`c_i`, the rows that add up to it, or 1 where None. A prompt with count 0 is ignored.
        confidence: share of the bootstrap distribution that lies in the interval.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: no prompt, different numbers of sums and counts, or a value that is not finite.

    Example:
        >>> estimate([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
        Estimate(value=0.375, low=0.125, high=0.75)
        >>> estimate([12.0, 3.0], counts=[4, 1]).value
        3.0
    """
    numerators = np.asarray(sums, dtype=np.float64)
    denominators = np.ones_like(numerators) if counts is None else np.asarray(counts, dtype=np.float64)
    if numerators.ndim != 1 or numerators.shape != denominators.shape:
        raise ValueError(f"{numerators.shape} sums have {denominators.shape} counts. Give one of each per prompt.")
    if not (np.isfinite(numerators).all() and np.isfinite(denominators).all()):
        raise ValueError("The values of all prompts must be finite. Omit the prompts that have none.")
    numerators, denominators = numerators[denominators > 0], denominators[denominators > 0]
    prompts = len(numerators)
    if not prompts:
        raise ValueError("There is no prompt to take a mean over.")
    value = float(numerators.sum() / denominators.sum())
    if prompts == 1:
        return Estimate(value, None, None)
    order = np.lexsort((denominators, numerators))
    numerators, denominators = numerators[order], denominators[order]
    generator = np.random.default_rng(seed)
    drawn = []
    step = max(1, _DRAWN_AT_ONCE // prompts)
    for start in range(0, resamples, step):
        index = generator.integers(prompts, size=(min(step, resamples - start), prompts))
        drawn.append(numerators[index].sum(-1) / denominators[index].sum(-1))
    outside = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), [outside, 1 - outside])
    return Estimate(value, float(low), float(high))
