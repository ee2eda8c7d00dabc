import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from lightning_lambdapo.commands.compare.statistics import (
    band,
    final_value,
    holm,
    mean_interval,
    paired_difference,
    read_curves,
    tokens_at,
    total_tokens,
)

T_975 = {2: 4.302652729911275, 4: 2.7764451051977987}  # Student's quantile by degrees of freedom, from a table


def attempt(directory: Path, version: int, rows: str) -> None:
    path = directory / "lightning_logs" / f"version_{version}"
    path.mkdir(parents=True)
    (path / "metrics.csv").write_text(rows)


def test_attempts_become_one_curve(tmp_path: Path) -> None:
    attempt(tmp_path, 9, "epoch,step,train/a,val/b\n0,0,1.0,\n0,1,2.0,\n0,1,,7.0\n0,2,3.0,\n0,3,4.0,\n0,3,,8.0\n")
    attempt(tmp_path, 10, "epoch,step,train/a\n0,2,30.0\n0,3,40.0\n0,4,50.0\n")
    attempt(tmp_path, 11, "epoch,step\n")
    attempt(tmp_path, 12, "epoch,step,val/b\n0,4,9.0\n")  # only the last validation was left to do
    curves = read_curves(tmp_path)
    assert {name: (x.tolist(), y.tolist()) for name, (x, y) in curves.items()} == {
        "train/a": ([0, 1, 2, 3, 4], [1, 2, 30, 40, 50]),
        "val/b": ([1, 4], [7, 9]),  # what came after the checkpoint that was resumed does not count
    }


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.csv"):
        read_curves(tmp_path)


def test_final_values() -> None:
    steps = np.arange(25.0)
    curves = {"train/a": (steps, steps**2), "val/b": (steps[:3], np.array([3.0, 1.0, 2.0]))}
    assert final_value(curves, "train/a") == (22**2 + 23**2 + 24**2) / 3, "ceil(25 / 10) steps"
    assert final_value(curves, "val/b") == 2.0
    with pytest.raises(ValueError, match=r"'val/c' was not logged\. There are train/a, val/b"):
        final_value(curves, "val/c")


def test_tokens_add_up() -> None:
    curves = {"train/rollout_tokens": (np.arange(3.0), np.array([5.0, 7.0, 1.0]))}
    assert total_tokens(curves) == 13
    assert tokens_at(curves, np.array([0.0, 2.0])).tolist() == [5, 13]


def test_student_interval() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    half = T_975[2] * 1.0 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-9)
    single = mean_interval([4.0])
    assert single.mean == 4.0
    assert math.isnan(single.low)
    assert math.isnan(single.high)


def test_pairs_are_by_seed() -> None:
    found = paired_difference({3: 0.9, 1: 0.5, 2: 0.7, 8: 0.0}, {1: 0.4, 2: 0.4, 3: 0.4, 9: 5.0})
    differences = [0.1, 0.3, 0.5]
    half = T_975[2] * 0.2 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), rel=1e-9)
    assert found.pairs == len(differences)
    assert found.p == pytest.approx(2 / 2**3)
    assert found.reading() == "no difference shown"


@pytest.mark.parametrize("seed", range(3))
def test_p_value_is_that_of_all_sign_flips(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.5, 1.0, 6)
    sums = [float(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=6)]
    own = float(differences.sum())
    tail = min(sum(each >= own - 1e-12 for each in sums), sum(each <= own + 1e-12 for each in sums)) / 64
    found = paired_difference(dict(enumerate(differences)), dict.fromkeys(range(6), 0.0))
    assert found.p == pytest.approx(min(1.0, 2 * tail))


def test_what_may_be_said() -> None:
    clear = paired_difference({1: 0.51, 2: 0.52, 3: 0.53}, {1: 0.4, 2: 0.41, 3: 0.42})
    assert clear.low > 0
    assert clear.reading() == "better"
    assert clear.reading(minimize=True) == "worse"
    worse = paired_difference({1: 0.4, 2: 0.41, 3: 0.42}, {1: 0.51, 2: 0.52, 3: 0.54})
    assert worse.reading() == "worse"
    assert worse.reading(minimize=True) == "better"
    two = paired_difference({1: 0.51, 2: 0.52}, {1: 0.4, 2: 0.41})
    assert two.reading() == "too few seeds (2)", "though its interval excludes zero"
    one = paired_difference({1: 0.5}, {1: 0.4})
    assert one.reading() == "too few seeds (1)"
    assert math.isnan(one.p)
    none = paired_difference({1: 0.5}, {2: 0.4})
    assert none.reading() == "too few seeds (0)"
    assert math.isnan(none.mean)


def test_an_arm_that_equals_the_baseline() -> None:
    same = dict.fromkeys(range(5), 0.25)
    found = paired_difference(same, same)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert found.reading() == "no difference shown"


def test_band_is_over_seeds_at_equal_tokens() -> None:
    x = np.arange(1.0, 12.0)  # 11 steps: no smoothing
    places, mean, low, high = band([(x, x), (10 * x, 10 * x + 4)], points=3)
    assert places.tolist() == [10.0, 10.5, 11.0], "what both reach"
    assert mean.tolist() == pytest.approx([12.0, 12.5, 13.0])
    # Of two seeds a resample's mean is that of the first alone, of the second alone, or the mean, 1 : 1 : 2.
    assert low.tolist() == pytest.approx([10.0, 10.5, 11.0])
    assert high.tolist() == pytest.approx([14.0, 14.5, 15.0])


def test_band_of_one_seed_is_its_smoothed_curve() -> None:
    x = np.arange(24.0)
    places, mean, low, high = band([(x, x % 2)], points=24)
    assert places.tolist() == x.tolist()
    assert mean.tolist() == [0.0, *[0.5] * 23], "a running mean over two of 24 steps, the first over one"
    assert low.tolist() == high.tolist() == mean.tolist()


def test_band_narrows_with_seeds() -> None:
    generator = np.random.default_rng(0)
    x = np.arange(10.0)
    wide, narrow = (band([(x, generator.normal(0, 1, 10)) for _ in range(count)]) for count in (4, 64))
    assert (narrow[3] - narrow[2]).mean() < 0.5 * (wide[3] - wide[2]).mean()
    # 95% of a normal mean lies within 1.96 standard errors.
    assert (narrow[3] - narrow[2]).mean() == pytest.approx(2 * 1.96 / 8, rel=0.25)


def test_holm_by_hand() -> None:
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, which may not be below its predecessor.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0], "at most 1"
    assert holm([]) == []
    found = holm([0.02, math.nan, 0.03])
    assert found[::2] == pytest.approx([0.04, 0.04]), "NaN is no comparison"
    assert math.isnan(found[1])
