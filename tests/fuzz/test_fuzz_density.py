"""Tokens and densities of arbitrary texts."""

import sys
from typing import Any, get_args

import pytest
from fuzz.fuzzing import fuzz, hostile_texts, quick, texts
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_lambdapo.functional import reasoning_trace, semantic_density, tokenize
from lightning_lambdapo.functional.semantic_density import Kind
from lightning_lambdapo.rewards import RewardInputs, SemanticDensityReward
from lightning_lambdapo.rewards.semantic_density import Measure

HOSTILE = hostile_texts()
MARKS = ("####", "\\boxed{", "<answer>")

token_lists = st.lists(
    st.sampled_from(["", "\0", "a", "A", "aa", "\ud800", "1", "\u0301"]) | st.text(max_size=2), max_size=8
)
betas = st.floats(0, exclude_min=True, allow_infinity=False) | st.sampled_from(
    [1, 5e-324, 1e200, sys.float_info.max, 10**400]
)


@fuzz(250)
@given(texts())
def test_tokens_hold_everything_but_white_space(text: str) -> None:
    tokens = tokenize(text)
    assert tokens == tokenize(text)
    assert all(token and not any(map(str.isspace, token)) for token in tokens)
    if text.isascii():  # elsewhere a letter's case may be two letters, or depend on its neighbours
        kept = "".join(tokens).lower().replace(",", "")
        assert kept == "".join(text.split()).lower().replace(",", "")


@fuzz(250)
@given(texts())
def test_traces_end_where_the_last_mark_starts(text: str) -> None:
    trace = reasoning_trace(text)
    assert text.startswith(trace)
    if any(mark in text for mark in MARKS):
        rest = text[len(trace) :]
        assert rest.startswith(MARKS)
        assert not any(mark in rest[1:].removeprefix("###") for mark in MARKS)
    else:
        assert trace == text


def subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by the textbook."""
    row = [0] * (len(second) + 1)
    for ours in first:
        previous = row
        row = [0]
        for place, theirs in enumerate(second):
            row.append(previous[place] + 1 if ours == theirs else max(previous[place + 1], row[place]))
    return row[-1]


@fuzz(300)
@given(token_lists, token_lists, betas, st.integers(1, 4))
@example([""], ["\0"], 1.0, 1)
@example(["a", "b"], ["a"], 1e200, 1)
@example(["a", "b"], ["a"], 10**400, 1)
@example(["a"], ["a"], 1.0, 10**12)
def test_densities_are_shares(ours: list[str], theirs: list[str], beta: float, n: int) -> None:
    for kind, length in (("rouge_l", 1), ("token", n)):
        found = semantic_density(ours, theirs, kind=kind, n=length, beta=beta)  # type: ignore[arg-type]
        assert all(type(value) is float and 0 <= value <= 1 for value in found)
        assert min(found[:2]) * (1 - 1e-12) <= found.f <= max(found[:2]) * (1 + 1e-12)
        swapped = semantic_density(theirs, ours, kind=kind, n=length, beta=beta)  # type: ignore[arg-type]
        assert (swapped.precision, swapped.recall) == (found.recall, found.precision)
        if not ours or not theirs:
            assert found == (0, 0, 0)
        if kind == "rouge_l" and ours and theirs:
            common = subsequence(ours, theirs)
            assert found[:2] == (common / len(ours), common / len(theirs))
        if ours == theirs and len(ours) >= length:
            assert found == (1, 1, 1)


@pytest.mark.parametrize("setting", [{"beta": 0}, {"beta": float("nan")}, {"beta": -1.0}, {"n": 0}, {"kind": "x"}])
def test_settings_are_refused(setting: Any) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` must be"):
        semantic_density(["a"], ["a"], **{"kind": "token", **setting})


@fuzz(200)
@given(
    st.lists(st.tuples(texts(12), st.none() | texts(12)), min_size=1, max_size=4),
    st.sampled_from(get_args(Kind)),
    st.sampled_from(get_args(Measure)),
)
def test_rewards_are_shares_or_none(rows: list[tuple[str, str | None]], kind: Kind, measure: Measure) -> None:
    values = SemanticDensityReward(kind=kind, measure=measure)(inputs(*rows))
    for (completion, reference), value in zip(rows, values, strict=True):
        assert (value is None) == (not reference)
        assert value is None or 0 <= value <= 1
        if value and reference:
            assert tokenize(reasoning_trace(completion))
            assert tokenize(reasoning_trace(reference))


def inputs(*rows: tuple[str, str | None]) -> RewardInputs:
    count = len(rows)
    return RewardInputs(
        prompts=["?"] * count,
        completions=[completion for completion, _ in rows],
        answers=[None] * count,
        references=[reference for _, reference in rows],
        completion_lengths=[1] * count,
        truncated=[False] * count,
        columns=[{}] * count,
    )


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:12]!r} x {len(text)}")
def test_hostile_texts_are_compared_in_time(text: str) -> None:
    with quick(f"{text[:12]!r} x {len(text)}"):
        tokenize(text)
        reasoning_trace(text)
        for kind in get_args(Kind):
            SemanticDensityReward(kind=kind)(inputs((text, text[:1_000] + "x"), (text, "so 1 and 2 make 3")))


def test_two_long_texts_are_compared_in_time() -> None:
    with quick("two texts of 100 kB"):
        SemanticDensityReward()(inputs(("a b " * 25_000, "b a a " * 17_000)))
