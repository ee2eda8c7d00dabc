"""Finding the final answer: each expectation is read off the text by hand."""

import pytest

from lightning_lambdapo.rewards.verifier.extraction import (
    AnswerFormat,
    boxed,
    final_answer,
    final_letter,
    leading_letter,
)

AUTO = [
    (r"so \boxed{18}", "18"),
    (r"\boxed{1}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{x^{2^{n}}} is it", "x^{2^{n}}"),
    (r"\boxed{7} and then cut off: \boxed{8", "7"),
    (r"nothing: \boxed{} but #### 5", "5"),
    (r"\fbox{3}", "3"),
    ("9 * 2 = 18\n#### 18", "18"),
    ("#### 17\nwait\n#### 1,234 dollars\n", "1,234 dollars"),
    ("##### a heading\nso 4", "4"),
    ("<answer> 3/4 </answer>", "3/4"),
    ("<answer>1</answer><answer>2</answer>", "2"),
    ("<answer>The sum is \\boxed{12}</answer>", "12"),
    ("<answer>#### 12</answer>", "12"),
    (r"#### \boxed{5}", "5"),
    (r"\boxed{4} #### 5", "5"),
    ("#### 5\n<answer>6</answer>", "6"),
    ("The answer is 18.", "18"),
    ("The answer is 3.5. That is all, 7 times.", "3.5"),
    ("The answer is: **42**", "42"),
    ("**Answer:** 42", "42"),
    ("The answer to the 2nd question is -7.", "-7"),
    ("The final answer is $\\frac{3}{4}$. I hope it is correct.", "$\\frac{3}{4}$"),
    ("The answer is blue.", "blue"),
    ("the answer is 18 eggs because 9 * 2 = 18", "18 eggs"),
    ("The answer is found by adding the number of all the apples: 3 + 4 = 7", "7"),
    ("#### 5 was wrong. The answer is 6", "6"),
    ("She has 3 + 4 = 7 apples", "7"),
    ("It costs $1,250.50.", "1,250.50"),
    ("from 10 to -3", "-3"),
    ("10-3", "3"),
    ("about 25%", "25%"),
    ("it is 3/4 of it", "3/4"),
    ("it is 2 1/2 of it", "2 1/2"),
    (r"x = \frac{1}{2}", r"\frac{1}{2}"),
    ("temperature \u22125", "\u22125"),
    ("no number", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), AUTO)
def test_auto_takes_the_last_mark_else_the_last_number(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer_format", "expected"), [("boxed", "1"), ("hash", "2"), ("tag", "3"), ("auto", "4"), ("letter", "B")]
)
def test_an_explicit_format_sees_its_own_mark_alone(answer_format: AnswerFormat, expected: str) -> None:
    text = "(B) \\boxed{1}\n#### 2\n<answer>3</answer>\nThe answer is 4."
    assert final_answer(text, answer_format) == expected


@pytest.mark.parametrize("answer_format", ["boxed", "hash", "tag"])
def test_an_explicit_format_has_no_fallback(answer_format: AnswerFormat) -> None:
    assert final_answer("The answer is 4", answer_format) is None


LETTERS = [
    (r"\boxed{C}", "C"),
    (r"\boxed{\text{(D)}}", "D"),
    (r"\boxed{\textbf{b}}", "B"),
    ("<answer>E</answer>", "E"),
    ("#### A", "A"),
    ("The answer is (C).", "C"),
    ("The correct answer is option J", "J"),
    ("Answer: c) 15 apples", "C"),
    ("The answer is C because A is too small", "C"),
    ("The answer is C, A is too small", "C"),
    (r"\boxed{B and C}", None),
    ("The answer is B or C", None),
    ("#### (A), (B), and (C)", None),
    (r"(A) or \boxed{\text{A}, \text{B}}", None),
    (r"not \boxed{A, B} but \boxed{D}", "D"),
    ("(A) is wrong, (B) is right", "B"),
    ("Let me think.\nD.", "D"),
    ("so it is **B**", "B"),
    (r"\boxed{15}, that is (C)", "C"),
    ("C. spiral cleavage", "C"),
    ("**B.** 12 apples\nsince B. is what is left", "B"),
    ("D) 3, not the others", "D"),
    ("A. 1\nB. 2\nC. 3", None),
    ("A cell has DNA.", None),
    ("E.g. the second", None),
    ("The answer is (K)", None),
    ("The answer is a hard one to find", None),
    ("15", None),
    ("WEB", None),
]


@pytest.mark.parametrize(("text", "letter"), LETTERS)
def test_letters(text: str, letter: str | None) -> None:
    assert final_letter(text) == letter


@pytest.mark.parametrize(
    ("content", "letter"), [("(C) 15", "C"), ("C.", "C"), ("C", "C"), ("A cat", None), ("(A+B)", None), ("(a)-1", None)]
)
def test_strict_letters_are_no_words_or_variables(content: str, letter: str | None) -> None:
    assert leading_letter(content, strict=True) == letter


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 50_000,
        "<answer>" * 50_000,
        "####" * 100_000,
        "answer to " * 50_000,
        "1" + ",111" * 100_000 + "1",
        "{}" * 9,
    ],
)
def test_hostile_texts_are_read_in_linear_time(text: str) -> None:
    # A quadratic search would run into the suite's time limit: 50,000 unclosed marks are 10^10 steps.
    final_answer(text)
    final_letter(text)


def test_every_balanced_box_is_found() -> None:
    assert boxed(r"\boxed{a\boxed{b}} } \boxed {c}") == [(8, "b"), (0, r"a\boxed{b}"), (21, "c")]
