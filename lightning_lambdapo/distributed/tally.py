"""Means, maxima and totals of a step. A logged mean is over all ranks' rows, never a mean of means."""

import math
from collections import defaultdict

from torch import Tensor

from lightning_lambdapo.distributed.parallel import gather_objects


class Tally:
    """Collects statistics of one step on one rank. :meth:`reduce` gives those of the whole global batch.

    Ranks may tally different names, for example if one has no row to learn from. A name without data on any rank is
    omitted.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._squares: defaultdict[str, float] = defaultdict(float)
        self._maxima: dict[str, float] = {}
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._weights: dict[str, tuple[float, float, float]] = {}

    def mean(self, name: str, values: Tensor) -> None:
        """Tally all elements of ``values`` for their mean."""
        self.ratio(name, values.double().sum().item(), values.numel())

    def mean_and_std(self, name: str, values: Tensor) -> None:
        """Tally ``values`` for their mean and, as ``<name>_std``, their unbiased standard deviation."""
        self.mean(name, values)
        self._squares[name] += values.double().square().sum().item()

    def ratio(self, name: str, numerator: float, denominator: float) -> None:
        """Tally ``sum of numerators / sum of denominators``."""
        self._sums[name] += numerator
        self._counts[name] += denominator

    def total(self, name: str, value: float) -> None:
        """Tally ``value`` for its sum over all ranks."""
        self._totals[name] += value

    def maximum(self, name: str, values: Tensor) -> None:
        """Tally the largest element of ``values``. NaN counts as the largest, on any rank and in any order."""
        if values.numel():
            self._maxima[name] = _larger(self._maxima.get(name, -math.inf), values.max().item())

    def effective_share(self, name: str, total: float, squares: float, count: float) -> None:
        """Tally ``count`` weights by their sum and sum of squares, for their effective sample size as a share.

        The share is ``(sum w)^2 / (count * sum w^2)`` (Kong 1992): 1 for equal weights, 0 if all are 0.
        """
        mine = self._weights.get(name, (0.0, 0.0, 0.0))
        self._weights[name] = mine[0] + total, mine[1] + squares, mine[2] + count

    def merge(self, other: "Tally") -> None:
        """Add everything that ``other`` has tallied."""
        for name, value in other._sums.items():
            self.ratio(name, value, other._counts[name])
        for name, value in other._squares.items():
            self._squares[name] += value
        for name, value in other._maxima.items():
            self._maxima[name] = _larger(self._maxima.get(name, -math.inf), value)
        for name, value in other._totals.items():
            self.total(name, value)
        for name, weights in other._weights.items():
            self.effective_share(name, *weights)

    def reduce(self) -> dict[str, float]:
        """Statistics over all ranks, the same on each of them. A collective."""
        total = Tally()
        for part in gather_objects(self):
            total.merge(part)
        values = {name: value / count for name, value in total._sums.items() if (count := total._counts[name])}
        for name, square in total._squares.items():
            if (count := total._counts[name]) > 1:
                variance = (square - total._sums[name] ** 2 / count) / (count - 1)
                values[f"{name}_std"] = math.sqrt(max(variance, 0.0))
        for name, (weight, square, count) in total._weights.items():
            if count:
                values[name] = weight**2 / (count * square) if square else 0.0
        return values | total._maxima | total._totals


def _larger(first: float, second: float) -> float:
    """The larger of two numbers, or NaN if either is NaN. Python's ``max`` depends on their order then."""
    return first if first > second or math.isnan(first) else second
