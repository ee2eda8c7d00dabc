r"""Pairs of answers of which math-verify alone is wrong: tiny numbers, upright constants, regions, and brackets."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_lambdapo.rewards import AccuracyReward, RewardInputs
from lightning_lambdapo.rewards.verifier.exact import clean, quantity, same_quantity


@pytest.fixture(scope="module")
def reward() -> Iterator[AccuracyReward]:
    judge = AccuracyReward(deadline=60.0)
    yield judge
    judge.close()


def judged(reward: AccuracyReward, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float | None]:
    count = len(pairs)
    texts, golds = [rf"so \boxed{{{answer}}}" for _, answer in pairs], [gold for gold, _ in pairs]
    verdicts = reward(
        RewardInputs(["?"] * count, texts, list(golds), [None] * count, [1] * count, [False] * count, [{}] * count)
    )
    return dict(zip(pairs, verdicts, strict=True))


#: kind, pairs that are equal, pairs that differ
PAIRS = [
    (
        "words after a value",
        [("12", r"12 \text{ more apples}"), ("12", r"12\text{ square cm}"), ("12", r"12 \text{ cm squared}"),
         ("3", r"3 \text{ times}"), ("12", r"12 \text{ (not including the first)}"),
         (r"\frac{3}{4}", r"\frac{3}{4} \text{ (or 0.75)}"), ("2, 3", r"2 \text{ or } 3"),
         ("16", r"16\text{ half-lives}"), (r"x<1 \text{ or } x>3", r"x<1 \text{ or } x>3")],
        [("12", r"12 \text{ or more}"), ("12", r"12 \text{ (or 13)}"), ("12", r"12 \text{ squared}"), ("James", "Jame"),
         ("12", r"12 \text{ times two}"),
         ("12", r"12 \text{ minus one}"), (r"\sqrt{2}", r"\sqrt{2} \text{ or possibly } \sqrt{3}"),
         (r"\sqrt{2}", r"\sqrt{2}\text{; }\sqrt{3}"), (r"\pi", r"\pi \text{ and a half}"),
         (r"\frac{3}{4}", r"\frac{3}{4} \text{ (or 0.7)}")],
    ),
    (
        "named values",
        [("x=2, y=3", "(2,3)"), ("x=2, y=3", "2, 3"), ("y=3, x=2", "(2,3)"), ("(2,3)", "x=2, y=3"),
         ("(2,3)", "y=3,x=2"), ("a=3, b=5", r"a = 3 \text{ and } b = 5"), ("m=2,b=-1", "(2,-1)"),
         ("x=2, x=3", r"\{2,3\}")],
        [("x=2, y=3", "(3,2)"), ("x=2, y=3", "3, 2"), ("x=2, y=3", r"3 \text{ and } 2"), ("(2,3)", "x=3, y=2"),
         ("a=3, b=5", "(5,3)"), ("x=2, y=3, z=4", "(4,3,2)"), ("x=2, y=3", "2"), ("m=2,b=-1", "(-1,2)")],
    ),
    (
        "type, colours and degrees",
        [("7", r"\bf 7"), ("7", r"\bm{7}"), ("7", r"\color{red}{7}"), ("7", r"{\large 7}"),
         ("7", r"\textcolor{blue}{7}"), ("16", "16 °C"), ("16^\\circ C", "16"), (r"16^\circ\text{C}", "16°C"),
         ("16°C", "16 degrees Celsius"), ("16°F", "16^\\circ"), ("16", r"16\ ℃"), ("3.33", r"\approx 3.33"),
         (r"\mathbb{R}", r"\mathbb R"), ("10:30", "10{:}30"), ("-5", r"\text{minus }5"),
         (r"\text{no solution}", r"\text{No solutions}")],
        [("7", r"\bf 8"), ("7", r"\color{red}{8}"), ("16°C", "16°F"), ("16°C", "17°C"), ("16 °F", "16 degrees celsius"),
         ("5", "minus 5"), (r"\mathbb{R}", r"\mathbb{Q}"), ("10:30", "10{:}31")],
    ),
    (
        "tiny numbers",
        [("5^{-40}", r"\frac{1}{5^{40}}"), ("5^{-40}", "25^{-20}"), (r"\frac{1}{25!}", r"\frac{1}{25\cdot 24!}"),
         (r"7\times10^{-30}", r"70\times 10^{-31}"), ("(5^{-40},1)", r"(\frac{1}{5^{40}},1)"),
         ("5^{-40}x", r"\frac{x}{5^{40}}"), (r"\frac{\pi}{10^{20}}", r"\pi\cdot10^{-20}"),
         (r"\begin{pmatrix}5^{-40}\\1\end{pmatrix}", r"\begin{pmatrix}\frac{1}{5^{40}}\\1\end{pmatrix}")],
        [("5^{-40}", "0"), ("0", "5^{-40}"), ("5^{-40}", "5^{-41}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
         ("2^{-99}", "2^{-98}"), ("(5^{-40},1)", "(-5^{-40},1)"), (r"\{5^{-40},1\}", r"\{-5^{-40},1\}"),
         ("5^{-40}x", "-5^{-40}x"), ("x=5^{-40}", "x=-5^{-40}"), ("[0,5^{-40}]", r"[0,3\cdot5^{-40}]"),
         (r"\begin{pmatrix}5^{-40}\\1\end{pmatrix}", r"\begin{pmatrix}-5^{-40}\\1\end{pmatrix}"), ("5^{-40}+x", "x"),
         ("5^{-40}i", "-5^{-40}i"), (r"\frac{\pi}{10^{20}}", r"\frac{\pi}{10^{21}}"), ("10^{-7}", "0.0000002"),
         (r"\frac{\pi}{10^8}", "0.000000"), ("e^{-50}", "0"), ("e^{-50}", "-e^{-50}"), ("10^{-25}+1", "1"),
         ("10^{-20}", "0.0"), (r"\sin(5^{-40})", r"\sin(-5^{-40})"), (r"\sqrt{10^{40}+1}", "10^{20}")],
    ),
    (
        "rounded numbers",
        [("4.123105625617661", r"\sqrt{17}"), (r"\pi", "3.141593"), (r"1.5\pi", r"\frac{3\pi}{2}"), ("0.1+0.2", "0.3"),
         ("1/3", "0.333333"), (r"\frac{1}{300}", "0.003333"), ("0", "0.000000"), ("0.5x", r"\frac{x}{2}"),
         (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), (r"9\%", "9"), (r"\infty", r"\infty")],
        [(r"\frac{1}{3000000}", "0.000000"), (r"\frac{1}{3000000}", "0.000001"), (r"\sqrt2", "1.414"), (r"\infty",
         "0")],
    ),
    (
        "upright e and i",
        [("e^{2}", r"\mathrm{e}^{2}"), (r"\mathrm{e}", "e"), (r"e^{\pi i}", r"\mathrm{e}^{\mathrm{i}\pi}"),
         (r"e^{i\pi/3}", r"\text{e}^{\text{i}\pi/3}"), (r"2\mathrm{i}", "2i"), (r"\operatorname{e}^x", "e^x"),
         (r"{\rm e}^3", "e^3"), (r"\frac{\mathrm{e}-1}{2}", r"\frac{e-1}{2}"), (r"1+\mathrm{i}\sqrt3", r"1+\sqrt3 i"),
         (r"\pi\mathrm{i}", r"i\pi"), ("i", r"\imath")],
        [(r"\mathrm{e}^3", "e^{4}"), (r"\mathrm{e}", "3"), (r"2\mathrm{i}", "2"), (r"2\mathrm{i}", "-2i"),
         (r"1+\mathrm{i}", r"1+\mathrm{e}"), (r"\mathrm{e}^{2}", r"2\mathrm{e}"), (r"\mathrm{i}", "1")],
    ),
    (
        "intervals and inequalities",
        [(r"[4,\infty)", r"4\le x"), (r"[4,\infty)", r"x\geqslant 4"), (r"[4,\infty)", "x \u2265 4"),
         (r"(-\infty,3)", "x<3"),
         (r"(-\infty,1)\cup(3,\infty)", r"x<1 \text{ or } x>3"), (r"x<1 \text{ or } x>3", r"(-\infty,1)\cup(3,\infty)"),
         (r"(-\infty,3)\cup(3,\infty)", r"x\ne 3"), ("[3,5]", r"3\le x\le 5"), ("(3,5]", r"3<x\le 5"),
         (r"(-2,\frac12)", "-2 < x < 0.5"), ("(1,3)", r"x>1 \text{ and } x<3"), (r"[\sqrt2,\infty)", r"x \ge \sqrt{2}"),
         (r"x \in [4,\infty)", r"x \ge 4"), (r"(3,\infty)", r"\{x \mid x > 3\}"), (r"(3,\infty)", r"\{x : x > 3\}"),
         (r"\mathbb{R}\setminus\{3\}", r"x \neq 3"), (r"[0,1]\cup[2,3]", r"0\le x\le1 \text{ or } 2\le x\le 3"),
         (r"x \ge 4", r"[4,\infty)"), (r"[4,\infty)", r"x \in [4,\infty)")],
        [(r"[4,\infty)", "x > 4"), (r"(3,\infty)", r"\{x \mid x \ge 3\}"), (r"x \in [4,\infty)", "x > 4"),
         (r"[4,\infty)", r"x \le 4"), (r"[4,\infty)", r"x \ge 5"), ("[3,5]", "3<x<5"),
         (r"(-\infty,1)\cup(3,\infty)", r"x<1 \text{ and } x>3"), (r"(-\infty,1)\cup(3,\infty)", "x<1"),
         ("[3,5]", r"x \ge 3"), ("x > 2", "y > 2"), (r"[4,\infty)", r"y+x \ge 4"), (r"\emptyset", "x<1 and x>3"),
         # a question is no answer to itself
         ("(-2,2)", "x^2<4"), (r"\{-2,2\}", "x^2=4"), ("(-3,3)", "|x|<3")],
    ),
    (
        "infinity is no end of an interval",
        [("[4,\u221e)", r"[4,\infty)"), (r"[4,+\infty)", r"[4,\infty)"), (r"(-\infty,3]", r"\left(-\infty,3\right]")],
        [(r"[4,\infty)", r"[4,\infty]"), (r"(-\infty,3]", r"[-\infty,3]"), (r"(-\infty,\infty)", r"[-\infty,\infty]"),
         (r"(-\infty,1)\cup[4,\infty)", r"(-\infty,1)\cup[4,\infty]"), (r"x\ge4", r"[4,\infty]"),
         ("[4,\u221e)", "[4,\u221e]")],
    ),
    (
        "brackets of points",
        [("(3,-1)", r"\left(3,-1\right)"), ("[3,-1]", "[3, -1]"), ("(2,-3)", "(x,y)=(2,-3)"),
         (r"[0,1)\cup[1,2]", r"[0,1]\cup(1,2]"), ("(100,200)", "(100, 200)")],
        [("(3,-1)", "[3,-1)"), ("(5,2)", "[5,2]"), ("(1,2,3)", "[1,2,3]"), ("(m,n)=(6,1)", "[6,1]"),
         ("(0,-4)", "[0,-4]"), ("(1,2),(3,4)", "[1,2],[3,4]"), (r"\left(3,-1\right)", r"\left[3,-1\right]"),
         ("(3,-1)", "(5,2)"), ("(a,b)", "[a,b]")],
    ),
    (
        "lists and long numbers",
        [("32, 349", "349, 32"), ("12,500", "12 500"), (r"10,\!000", "10000"), ("t = 73", "t &= 73")],
        [("32349", "32, 349"), ("100200", "100, 200"), ("5", "x=5, x=-5"), (r"\{3,8\}", "3")],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("equal", "different"), [case[1:] for case in PAIRS], ids=[case[0] for case in PAIRS])
def test_pairs(reward: AccuracyReward, equal: list[tuple[str, str]], different: list[tuple[str, str]]) -> None:
    assert judged(reward, equal) == dict.fromkeys(equal, 1.0)
    assert judged(reward, different) == dict.fromkeys(different, 0.0)
    assert reward.statistics().get("verifier_failure_share", 0.0) == 0.0


@pytest.mark.parametrize(
    ("ratio", "decimal", "same"),
    [("1/3", "0.333333", True), ("1/300", "0.003333", True), ("1/3000000", "0.000000", False), ("0", "0.000000", True),
     ("1/30000", "0.000033", False), ("2/3", "0.666667", True), ("2/3", "0.666666", False)],
)  # fmt: skip
def test_a_rounded_number_has_digits_that_count(ratio: str, decimal: str, same: bool) -> None:
    first, second = quantity(clean(ratio)), quantity(clean(decimal))
    assert first is not None
    assert second is not None
    assert same_quantity(first, second) is same
    assert same_quantity(second, first) is same


def test_trial_pairs_come_out_as_expected(reward: AccuracyReward, shared_trials: Path) -> None:
    lines = [json.loads(line) for line in (shared_trials / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines
    expected = {(line["gold"], line["answer"]): float(line["expected"]) for line in lines}
    assert judged(reward, list(expected)) == expected
