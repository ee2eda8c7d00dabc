"""Exact numbers in short answers."""

from fractions import Fraction

import pytest

from lightning_lambdapo.rewards.exact import canonical, clean, quantity, too_costly


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
     "18 or 19", "5 and a half", "2 thirds", "(1,2)", "1e400", "5!", "2^3", "2²", "--5", "1" * 65, "3:45", "5%%"],
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
