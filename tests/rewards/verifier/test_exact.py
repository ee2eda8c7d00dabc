"""Exact numbers in short answers."""

from fractions import Fraction

import pytest

from lightning_lambdapo.rewards.verifier.exact import (
    bracketing,
    canonical,
    clean,
    latex,
    notation,
    quantity,
    same_quantity,
    too_costly,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", Fraction(18)),
        ("-18.", Fraction(-18)),
        ("+0.50", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("14.0", Fraction(14)),
        ("1,234,567", Fraction(1234567)),
        ("1 000 000", Fraction(1000000)),
        ("1{,}000", Fraction(1000)),
        ("$18.00", Fraction(18)),
        (r"\$ 18", Fraction(18)),
        ("-$5", Fraction(-5)),
        ("3/4", Fraction(3, 4)),
        ("-6/8", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\tfrac34", Fraction(3, 4)),
        ("2 1/2", Fraction(5, 2)),
        (r"-2\frac{1}{2}", Fraction(-5, 2)),
        ("1.5e3", Fraction(1500)),
        (r"1.5 \times 10^{-2}", Fraction(3, 200)),
        (r"15\cdot 10^2", Fraction(1500)),
        ("4 \u00d7 10\u2076", Fraction(4_000_000)),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"-1.2\overline{27}", Fraction(-27, 22)),
        ("15 miles per hour", Fraction(15)),
        ("2E-2", Fraction(1, 50)),
        ("5 million", Fraction(5_000_000)),
        ("2 dozen eggs", Fraction(24)),
        ("18 dollars", Fraction(18)),
        ("18 eggs per day", Fraction(18)),
        ("12cm", Fraction(12)),
        (r"12\text{ cm}^2", Fraction(12)),
        (r"\frac{1}{2}\text{ cup}", Fraction(1, 2)),
        (r"90^\circ", Fraction(90)),
        (r"$90^{\circ}$", Fraction(90)),
        ("\u22123", Fraction(-3)),
    ],
)
def test_numbers_are_read_exactly(text: str, value: Fraction) -> None:
    read = quantity(clean(text))
    assert read is not None
    assert read.value == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "5x", "5 x", "5xy", "5abc", "5 pi", "5\\pi", "1,23", "12,3456", "3 5", "1/0", "1/2/3", "1.2.3",
     "18 or 19", "5 and a half", "2 thirds", "(1,2)", "1e400", "5!", "2^3", "2²", "--5", "1" * 65, "3:45", "5%%",
     r"1\overline{3}", r"1/2\overline{3}", r"1/2\times 10^2", r"2\times 10^{400}", r"2\times 10^2 x", r"2\times 10"],
)  # fmt: skip
def test_anything_else_is_no_number(text: str) -> None:
    assert quantity(clean(text)) is None


def test_a_percentage_and_a_unit_are_kept_apart_from_the_value() -> None:
    percentage, length = quantity("25%"), quantity("3 centimetres")
    assert percentage is not None
    assert length is not None
    assert (percentage.value, percentage.percent) == (Fraction(25), True)
    assert (length.value, length.percent, length.unit) == (Fraction(3), False, "cm")


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9^{9}}}", "9**9**9", "9^9^9", "(2^{10})^{99999}", "10^{123456}", "2^(3^4)", "99999!", "(9!)!", "2^{9!}",
     "1" * 65, "2^{-(3^4)}", "7^{1,000,000}"],
)  # fmt: skip
def test_bombs_are_refused(text: str) -> None:
    assert too_costly(text)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("20 cm^2", "20 cm\u00b2", True), ("20 cm^2", "20 cm^3", False), ("20 cm^2", "20 cm", False),
        ("20 square cm", "20 cm^2", True), ("15 mph", "15 miles per hour", True), ("80 km/h", "80 kph", True),
        ("15 mph", "15 km/h", False), ("15 mph", "15 miles", False), (r"0.\overline{3}", "0.333333", True),
    ],
)  # fmt: skip
def test_units_and_their_powers_are_compared(first: str, second: str, same: bool) -> None:
    read = [quantity(clean(text)) for text in (first, second)]
    assert read[0] is not None
    assert read[1] is not None
    assert same_quantity(read[0], read[1]) is same
    assert same_quantity(read[1], read[0]) is same


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("3:4", "6:8", True), ("0.5:1", "1:2", True), ("2:3:5", "2:5:3", False), ("3:00", "5:00", False),
        ("1:05", "2:10", False), ("0:1", "0:2", False), ("1011_2", "11_{10}", True), ("1F_{16}", "31_{10}", True),
        ("(101)_2", "101_{2}", True), ("101_2", "101_3", False), ("101_2", "5:1", False),
    ],
)  # fmt: skip
def test_ratios_and_numerals_are_compared(first: str, second: str, same: bool) -> None:
    assert notation(first) is not None
    assert notation(second) is not None
    assert (notation(first) == notation(second)) is same


@pytest.mark.parametrize("text", ["", "3", "3:", ":4", "3:x", "x_2", "a_{16}", "12_1", "12_2", "12_{99}", "1_{100}"])
def test_anything_else_is_neither_ratio_nor_numeral(text: str) -> None:
    assert notation(text) is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (r"\{1,2\}", "set"), ("{1}", "set"), (r"\{\frac{1}{2},\sqrt{2}\}", "set"), ("(1,2]", "ordered"),
        (r"(0,1)\cup(2,3)", "ordered"), ("(5)", ""), ("5", ""), (r"\{x:1<x<2\}", ""), (r"\{x\mid x\in(1,2)\}", ""),
        (r"\{x|1\leq x\leq 2\}", ""),
    ],
)  # fmt: skip
def test_brackets_tell_sets_from_tuples(text: str, kind: str) -> None:
    assert bracketing(text) == kind


def test_a_bomb_in_superscripts_is_one() -> None:
    assert too_costly(latex("9" + "\u2079" * 5))
    assert too_costly(latex("9^{9\u2079}"))
    assert not too_costly(latex("x\u00b2 + 2\u00b9\u2070"))


@pytest.mark.parametrize(
    "text",
    [
        "e^{x^2}",
        "x^2+3^2",
        "2^{10}",
        "x^{2}y^{3}",
        "10^{1000}",
        "5!",
        "2^n",
        r"\frac{x^2}{y^3}",
        "3^",
        "^{",
        "x^{-2}+1",
    ],
)
def test_ordinary_powers_are_not(text: str) -> None:
    assert not too_costly(text)


@pytest.mark.parametrize(
    "spellings",
    [
        ["0.5", "1/2", r"\frac12", r"$\dfrac{1}{2}$", "0.50", "x = 0.5", "2/4", ".5"],
        ["1,000", "1000", "$1000", "1000.00", "1000 dollars", "1 thousand"],
        ["(1, 2)", r"\left(1,2\right)", "$(1,\\, 2)$"],
        ["Blue", "blue.", r"\text{blue}"],
        ["50", "50%", "50 percent"],
    ],
)
def test_votes_have_one_spelling(spellings: list[str]) -> None:
    assert len({canonical(spelling) for spelling in spellings}) == 1


def test_votes_for_different_answers_differ() -> None:
    answers = ["1/2", "2", "-1/2", "(1,2)", "(2,1)", "x", "blue", "5x", "0.05"]
    assert len({canonical(answer) for answer in answers}) == len(answers)
