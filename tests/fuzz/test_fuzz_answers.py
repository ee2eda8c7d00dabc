"""Whatever a completion holds, the readers of answers answer: in time, and within what they promise."""

import re
from collections.abc import Callable
from typing import Any, get_args

import pytest
from fuzz.fuzzing import fuzz, hostile_texts, quick, texts
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_lambdapo.rewards import FormatReward, RewardInputs
from lightning_lambdapo.rewards.formatting import Style
from lightning_lambdapo.rewards.verifier.exact import (
    bracketing,
    canonical,
    clean,
    is_text,
    latex,
    notation,
    quantity,
    same_quantity,
    too_costly,
)
from lightning_lambdapo.rewards.verifier.extraction import (
    AnswerFormat,
    boxed,
    final_answer,
    final_letter,
    hashed,
    last_number,
    leading_letter,
    marked_answer,
    tagged,
    trailing_letter,
)

LETTERS = set("ABCDEFGHIJ")
FORMATS = get_args(AnswerFormat)
HOSTILE = hostile_texts()


def inputs(*completions: str) -> RewardInputs:
    count = len(completions)
    return RewardInputs(
        prompts=["?"] * count,
        completions=list(completions),
        answers=[None] * count,
        references=[None] * count,
        completion_lengths=[1] * count,
        truncated=[False] * count,
        columns=[{}] * count,
    )


def name(text: str) -> str:
    return f"{text[:12]!r} x {len(text)}"


@fuzz(250)
@given(texts(), st.sampled_from(FORMATS))
def test_final_answers_are_parts_of_the_text(text: str, answer_format: AnswerFormat) -> None:
    for found in (
        final_answer(text, answer_format),
        marked_answer(text, answer_format),
        marked_answer(text, answer_format, phrases=False),
    ):
        if answer_format != "letter" and found is not None:
            assert found
            assert found == found.strip()
            assert found in text or all(part in text for part in re.split(", |=", found))  # several boxes, one answer
    assert final_answer(text, answer_format) == final_answer(text, answer_format)


@fuzz(250)
@given(texts())
def test_marks_stand_where_they_are_said_to(text: str) -> None:
    for finder, opening in ((boxed, "\\"), (hashed, "####"), (tagged, "<answer>")):
        for start, content in finder(text):
            assert text.startswith(opening, start)
            assert content in text[start:]
    assert len(tagged(text)) <= 1
    assert len(boxed(text)) <= text.count("box")
    assert (last_number(text) is not None) == any(character.isdecimal() for character in text)


@fuzz(250)
@given(texts(), st.booleans())
@example("(\u0130)", False)
@example("\u0131)", False)
def test_letters_are_from_a_to_j(text: str, strict: bool) -> None:
    for found in (leading_letter(text, strict=strict), trailing_letter(text), final_letter(text)):
        assert found is None or found in LETTERS


@fuzz(300)
@given(texts(12))
@example("1e99")
@example("1e-99")
@example("x=**5**")
@example('x="Blue"')
def test_votes_are_their_own_votes(text: str) -> None:
    voted = canonical(text)
    assert canonical(text) == voted
    cleaned = clean(text)
    assert cleaned == cleaned.strip()
    again = canonical(voted)
    if quantity(again) is not None or is_text(again):
        assert again == voted


@fuzz(300)
@given(texts(8), texts(8))
def test_quantities_are_exact_and_compare_both_ways(first: str, second: str) -> None:
    read = [number for number in (quantity(first), quantity(clean(first)), quantity(clean(second))) if number]
    for number in read:
        assert number.decimals is None or number.decimals >= 0
        assert same_quantity(number, number)
        for other in read:
            assert same_quantity(number, other) == same_quantity(other, number)


@fuzz(300)
@given(texts(20))
def test_a_text_in_latex_stays_as_it_is(text: str) -> None:
    assert latex(latex(text)) == latex(text)
    assert len(latex(text)) <= 10 * len(text)


@fuzz(150)
@given(st.integers(-(10**60), 10**60), st.integers(1, 10**4), st.sampled_from(["{}/{}", "$\\frac{{{}}}{{{}}}$."]))
def test_fractions_are_read_back(top: int, bottom: int, form: str) -> None:
    from fractions import Fraction

    read = quantity(clean(form.format(top, bottom)))
    assert (read and read.value) == (Fraction(top, bottom) if len(f"{abs(top)}{bottom}") <= 64 else None)


@fuzz(200)
@given(texts(40))
def test_costs_are_judged(text: str) -> None:
    assert too_costly(text) in {True, False}
    assert too_costly(text + "1" * 65)


@fuzz(200)
@given(texts(), st.sampled_from(get_args(Style)))
def test_formats_are_judged(text: str, style: Style) -> None:
    reward = FormatReward(style=style)
    (value,) = reward(inputs(text))
    assert value in {0.0, 1.0}
    if value and style != "think_answer":
        assert marked_answer(text, style)
    body = text.replace("<", "").replace("#", "").replace("boxed{", "").replace("{", "").replace("}", "")
    body = body.strip("\\ ") or "1"
    if body.strip():
        well_formed = {
            "boxed": f"so \\boxed{{{body} }}",
            "hash": f"so\n#### 1{body}",
            "tag": f"so <answer>{body}</answer>",
            "think_answer": f" <think>{body}</think>\n<answer>{body}</answer>\n",
        }
        assert reward(inputs(well_formed[style], well_formed[style] * 2)) == [1.0, 0.0]


@fuzz(100)
@given(st.text(max_size=8))
def test_patterns_compile_or_are_refused(pattern: str) -> None:
    try:
        reward = FormatReward(pattern=pattern)
    except ValueError as error:
        assert "is not a regular expression" in str(error)  # noqa: PT017 -- either outcome is right
    else:
        assert reward(inputs("a1"))[0] in {0.0, 1.0}


READERS: list[Callable[[str], Any]] = [
    *(lambda text, form=form: final_answer(text, form) for form in FORMATS),
    last_number,
    leading_letter,
    latex,
    clean,
    quantity,
    canonical,
    is_text,
    lambda text: bracketing(text[:512]),
    lambda text: notation(text[:512]),
    lambda text: too_costly(text[:10_000]),
    *(lambda text, style=style: FormatReward(style=style)(inputs(text)) for style in get_args(Style)),
]


@pytest.mark.parametrize("text", HOSTILE, ids=name)
def test_hostile_texts_are_read_in_time(text: str) -> None:
    for reader in READERS:
        with quick(f"{reader} of {name(text)}"):
            reader(text)


def test_contents_of_nested_boxes_are_not_all_held_at_once() -> None:
    import tracemalloc

    text = "#### " + "\\boxed{" * 5_000 + "1" + "}" * 5_000
    tracemalloc.start()
    try:
        assert final_answer(text) == "1"
        assert final_letter(text) is None
        assert FormatReward()(inputs(text.replace("boxed", "fbox"))) == [0.0]
        assert tracemalloc.get_traced_memory()[1] < 20e6  # together they are 100 MB
    finally:
        tracemalloc.stop()
