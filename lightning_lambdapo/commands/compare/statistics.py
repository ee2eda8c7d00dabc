"""Curves and final values of runs, with intervals over seeds and paired differences."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lambdapo.runs.files import first_and_last, read_metrics, versions

Array = npt.NDArray[np.float64]
TOKENS = "train/rollout_tokens"
_FEWEST_PAIRS = 3


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval. NaN bounds where there are fewer than two values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """Mean of paired differences, its interval, the two-sided sign-flip permutation test's p-value, how many pairs."""

    p: float
    pairs: int

    def reading(self, *, minimize: bool = False) -> str:
        """What the difference shows: nothing if the interval includes zero or there are fewer than three pairs.

        Example:
            >>> Difference(0.1, -0.02, 0.22, 0.25, 5).reading(), Difference(0.1, 0.02, 0.18, 0.0625, 5).reading()
            ('no difference shown', 'better')
            >>> Difference(0.1, 0.02, 0.18, 0.0625, 5).reading(minimize=True)
            'worse'
        """
        if self.pairs < _FEWEST_PAIRS:
            return f"too few seeds ({self.pairs})"
        if not (self.low > 0 or self.high < 0):  # NaN is no difference
            return "no difference shown"
        return "better" if (self.mean > 0) != minimize else "worse"


def read_curves(directory: Path) -> dict[str, tuple[Array, Array]]:
    """All that a run logged: name -> steps and values, over the attempts that an interrupted run consists of.

    A later attempt resumes from a checkpoint, so earlier attempts count only up to its first training step.

    Raises:
        ValueError: there is no log in ``directory``.
    """
    attempts = [run for run in versions(directory / "lightning_logs") if (run / "metrics.csv").is_file()]
    if not attempts:
        raise ValueError(f"{directory} holds no metrics.csv of a run.")
    points: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for run in reversed(attempts):
        rows = read_metrics(run)
        first = min((row["step"] for row in rows if any(name.startswith("train/") for name in row)), default=math.inf)
        for name, curve in points.items():
            points[name] = {step: value for step, value in curve.items() if step < first}
        for row in rows:
            for name in row.keys() - {"step", "epoch"}:
                points[name][int(row["step"])] = row[name]
    return {
        name: (_array(sorted(curve)), _array(curve[step] for step in sorted(curve)))
        for name, curve in points.items()
        if curve
    }


def final_value(curves: Mapping[str, tuple[Array, Array]], metric: str) -> float:
    """A run's last value of an evaluation metric, or a training metric's mean over the last tenth of the steps.

    Raises:
        ValueError: the run did not log it.
    """
    if metric not in curves:
        raise ValueError(
            f"The metric {metric!r} was not logged. There are {', '.join(sorted(curves))}. Choose one with --metric. "
            "Finished runs are not repeated."
        )
    values = curves[metric][1]
    if not metric.startswith("train/"):
        return float(values[-1])
    ends = first_and_last(values.tolist())
    return math.nan if ends is None else ends[1]


def total_tokens(curves: Mapping[str, tuple[Array, Array]]) -> float:
    """Tokens sampled in the whole run."""
    return float(curves[TOKENS][1].sum())


def tokens_at(curves: Mapping[str, tuple[Array, Array]], steps: Array) -> Array:
    """Tokens sampled up to and with each of ``steps``. Every training step logs its own."""
    places, tokens = curves[TOKENS]
    return _array(np.interp(steps, places, np.cumsum(tokens)))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with Student's interval.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])
        Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    from scipy import stats

    data = _array(values)
    mean = float(data.mean())
    if len(data) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data)))
    return Interval(mean, mean - half, mean + half)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Differences from the baseline over the seeds that both have. NaN where there is none.

    The permutation test flips the signs of the differences: with n seeds its smallest p-value is 2 / 2^n.

    Args:
        values: seed -> final value.
        baseline: the same for the baseline.
    """
    from scipy import stats

    differences = _array(values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys()))
    pairs = len(differences)
    if not pairs:
        return Difference(math.nan, math.nan, math.nan, math.nan, 0)
    interval = mean_interval(list(differences))
    if pairs == 1:
        return Difference(interval.mean, interval.low, interval.high, math.nan, 1)
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    )
    return Difference(interval.mean, interval.low, interval.high, float(test.pvalue), pairs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several comparisons: p-values that may be read together. NaN stays and is not counted.

    The smallest of m p-values is multiplied by m, the next by m - 1, and so on. None is below its predecessor or above
    1.

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    found, largest = list(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        found[index] = largest
    return found


def band(curves: Sequence[tuple[Array, Array]], points: int = 100) -> tuple[Array, Array, Array, Array]:
    """Mean over seeds of smoothed curves with its bootstrap 95% band: places, mean, low, high, ``(points,)`` each.

    Each curve is a running mean over a twelfth of its steps, at the places that all curves reach. Seeds are resampled
    2,000 times. One curve has a band of width 0.

    Args:
        curves: places (ascending) and values of each seed.
        points: how many places.
    """
    from scipy import stats

    places = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), points)
    smooth = np.stack([np.interp(places, x, _running_mean(y)) for x, y in curves])
    mean = smooth.mean(0)
    if len(curves) == 1:
        return places, mean, mean, mean
    interval = stats.bootstrap(
        (smooth,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return places, mean, interval.low, interval.high


def _running_mean(values: Array) -> Array:
    """Mean over the last twelfth of all steps, up to each step."""
    window = max(1, len(values) // 12)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return _array((sums[ends] - sums[starts]) / (ends - starts))


def _array(values: Any) -> Array:
    return np.asarray(values if isinstance(values, Sequence | np.ndarray) else list(values), dtype=np.float64)
