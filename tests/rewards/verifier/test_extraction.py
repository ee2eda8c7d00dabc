"""Finding the final answer: each expectation is read off the text by hand."""

import pytest

from lightning_lambdapo.rewards.verifier.extraction import (
    AnswerFormat,
    boxed,
    final_answer,
    final_letter,
    leading_letter,
    marked_answer,
    unmarked_letter,
)
from lightning_lambdapo.rewards.verifier.marks import spoken
from lightning_lambdapo.rewards.verifier.mathematics import spans

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
        "\\boxed\\frac{1" * 10_000,
        "\\boxed 1 and " * 10_000,
        "\\boxed{1}, " * 10_000,
        "$1$, " * 20_000,
        "$1" * 50_000,
        "$ " * 50_000,
        "\\[" * 50_000,
        "\\( $ $$ " * 10_000,
        "\\begin{align}" * 10_000,
        "\\[" + "1 \\\\ " * 20_000 + "\\]",
        "the answer is\n- 1\n" * 10_000,
        "the answer is\n1. so 1\n" * 10_000,
        "the answer is found " * 10_000,
        "answer for " * 20_000,
        "not 1, " * 20_000,
        "not A, " * 20_000,
        "not really " * 20_000,
        "n't think the answer to it is " * 5_000,
        "hardly unlikely " * 10_000,
        "not, in fact, " * 20_000,
        "not" + " to be" * 40_000,
        "not\n" * 50_000,
        "1? No, " * 20_000,
        "1," * 100_000 + "?",
        "the answer is 1? No, it is " * 5_000,
        "Answer: I doubt it is " * 5_000,
        "choose A " * 20_000,
        "A or " * 20_000,
        "<think>" * 20_000,
        "</think>" * 20_000,
        "&" * 100_000,
        "\\text{\\text{" * 10_000,
        "**5**" + ". " * 50_000,
        "**5** " * 20_000,
        "(A) " * 20_000,
        "(A) is true. " * 10_000,
        "#### Step 1\n" * 10_000,
        "the wrong answer is 1. " * 5_000,
        "the answer is 1. No, " * 5_000,
        "1 and " * 20_000 + "1",
        "(1, " * 20_000 + "1",
        "1:" * 50_000,
    ],
)
def test_hostile_texts_are_read_in_linear_time(text: str) -> None:
    # A quadratic search would run into the suite's time limit: 50,000 unclosed marks are 10^10 steps.
    final_answer(text)
    final_letter(text)
    unmarked_letter(text)


BARE = [
    (r"\boxed 9", "9"),
    (r"$x = \boxed 12$", "12"),
    (r"\boxed -3.", "-3"),
    (r"\boxed\frac12", r"\frac12"),
    (r"\boxed \frac 1 2", r"\frac 1 2"),
    (r"\boxed\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed\dfrac{1}{2}$.", r"\dfrac{1}{2}"),
    (r"\boxed\sqrt2", r"\sqrt2"),
    (r"\boxed\sqrt[3]{5}", r"\sqrt[3]{5}"),
    (r"\boxed 3\sqrt{2}", r"3\sqrt{2}"),
    (r"\boxed\pi", r"\pi"),
    (r"\boxed 5x$", "5x"),
    (r"\boxed x$", "x"),
    (r"\boxed 2^{10}", "2^{10}"),
    (r"\boxed 1/2", "1/2"),
    (r"\boxed 1,234.5, roughly", "1,234.5"),
    (r"\boxed 50\%", r"50\%"),
    (r"\boxed\text{Evelyn}", r"\text{Evelyn}"),
    (r"\fbox 7", "7"),
    (r"\boxed{1} and then \boxed 2", "2"),
    (r"\boxed{2}, not \boxed to 3", "2"),
]


@pytest.mark.parametrize(("text", "content"), BARE)
@pytest.mark.parametrize("answer_format", ["auto", "boxed"])
def test_latex_boxes_without_braces(text: str, content: str, answer_format: AnswerFormat) -> None:
    assert final_answer(text, answer_format) == content
    assert marked_answer(text, phrases=False) == content


@pytest.mark.parametrize(
    "text",
    [r"use \boxed to answer", r"in \boxed, 5", r"\boxed", r"\boxed}", r"\boxed answer", r"\boxed a b", r"\boxedx 5",
     r"\boxed\left(3", r"\boxed{5", r"\boxed\quad 5", r"\boxed$5$"],
)  # fmt: skip
def test_a_mention_of_boxes_is_none(text: str) -> None:
    assert boxed(text) == []


def test_a_mark_may_hold_a_sentence() -> None:
    assert final_answer("<answer>The final answer is 33.</answer>", "tag") == "33"
    assert final_answer("#### Answer: 7", "hash") == "7"
    assert final_answer("<answer>33 is prime</answer>", "tag") == "33 is prime"
    assert final_answer("#### Step 1", "hash") == "Step 1"


def test_boxes_in_boxes_without_braces() -> None:
    assert boxed(r"\boxed\boxed{5}") == [(6, "5")]
    assert boxed(r"\boxed{a\boxed 5}") == [(8, "5"), (0, r"a\boxed 5")]
    assert final_answer(r"<answer>\boxed 5</answer>") == "5"


@pytest.mark.parametrize(
    ("text", "left"),
    [("<think>a</think>b", "b"), ("<think>a", ""), ("a<think>b", "a"), ("a</think>b<think>c", "b"), ("a", "a"),
     ("<think>a</think>b<think>c</think>d", "d"),
     ("<Thinking>a</Thinking> b", " b"), ("<think>a<think>b</think>c", "c")],
)  # fmt: skip
def test_what_is_said_outside_thoughts(text: str, left: str) -> None:
    assert spoken(text) == left


def test_maths_is_told_from_money() -> None:
    texts = ["$5 and $6", "5$ and 6$", "$5, $6, $x$", r"costs \$5 and \$6", "$x$ for $5", "$5-$6", "$5 for a $x=3$ b"]
    found = [[text[span.inside : span.outside] for span in spans(text)] for text in texts]
    assert found == [[], [], ["x"], [], ["x"], [], ["x=3"]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\[ a \\[2pt] b \] \(c\)", [r" a \\[2pt] b ", "c"]),
        ("$$a\nb$$ $c$", ["a\nb", "c"]),
        (r"\( never closed $x$ \[y\]", ["x", "y"]),
        (r"\begin{align*}x\end{align*}", ["x"]),
        (r"\[\begin{aligned}x\end{aligned}\]", [r"\begin{aligned}x\end{aligned}"]),
        ("$a\nb$", []),
        ("$$", []),
        (r"\$x\$", []),
    ],
)
def test_maths_in_texts(text: str, found: list[str]) -> None:
    assert [text[span.inside : span.outside] for span in spans(text)] == found


def test_every_balanced_box_is_found() -> None:
    assert boxed(r"\boxed{a\boxed{b}} } \boxed {c}") == [(8, "b"), (0, r"a\boxed{b}"), (21, "c")]
