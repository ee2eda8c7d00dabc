"""Tokens, traces, and the overlap of a trace with a reference."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lambdapo.functional import reasoning_trace, semantic_density, tokenize

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = st.lists(st.sampled_from(["a", "b", "c", "\\frac", "12"]), max_size=12)


def test_tokenize_golden() -> None:
    rows = json.loads((GOLDEN / "tokenize.json").read_text())
    assert len(rows) == 10
    for row in rows:
        assert tokenize(row["text"]) == row["tokens"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A_1,b", ["a", "_", "1", ",", "b"]),
        ("1,234,567.5,", ["1234567.5", ","]),
        ("\\Frac\\alpha1", ["\\Frac", "\\alpha", "1"]),
        ("\\", ["\\"]),
        ("²X", ["²x"]),  # a word, though its first character calls itself a digit
        ("ÉTÉ-Été", ["été", "-", "été"]),
        (",,", [",", ","]),
    ],
)
def test_tokenize_by_hand(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_tokenize_drops_nothing_but_white_space_and_commas_of_numbers(text: str) -> None:
    # casefold, since lower() of a capital sigma depends on its neighbours
    kept = "".join(tokenize(text)).replace(",", "").casefold()
    assert kept == "".join(text.split()).replace(",", "").casefold()


@pytest.mark.parametrize(
    ("text", "trace"),
    [
        ("2 + 2 = 4\n#### 4", "2 + 2 = 4\n"),
        ("so \\boxed{4} and \\boxed{5}.", "so \\boxed{4} and "),
        ("<answer>1</answer> #### 2", "<answer>1</answer> "),
        ("a \\boxed{3} then <answer>3</answer>", "a \\boxed{3} then "),
        ("#### 4", ""),
        ("no marker, ### and \\boxed 4", "no marker, ### and \\boxed 4"),
        ("", ""),
    ],
)
def test_reasoning_trace_ends_before_the_last_marker(text: str, trace: str) -> None:
    assert reasoning_trace(text) == trace


def test_semantic_density_golden() -> None:
    rows = json.loads((GOLDEN / "semantic_density.json").read_text())
    assert len(rows) == 36
    for row in rows:
        expected = {name: row.pop(name) for name in ("precision", "recall", "f")}
        found = semantic_density(**row)
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value, abs=1e-9), name


@settings(max_examples=300, deadline=None)
@given(
    TOKENS,
    TOKENS,
    st.sampled_from([("rouge_l", 1), ("token", 1), ("token", 2), ("token", 3)]),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_semantic_density_equals_the_loops(
    generated: list[str], solution: list[str], kind: tuple[Any, int], beta: float
) -> None:
    found = semantic_density(generated, solution, kind=kind[0], n=kind[1], beta=beta)
    expected = reference.semantic_density(generated, solution, kind=kind[0], n=kind[1], beta=beta)
    assert tuple(found) == pytest.approx(expected, abs=1e-12)
    assert all(0 <= value <= 1 for value in found)


def test_by_hand() -> None:
    # "a b d" is the longest common subsequence; order matters to it and not to single tokens.
    generated, solution = ["a", "b", "c", "d"], ["b", "a", "b", "d", "d", "e"]
    assert tuple(semantic_density(generated, solution)) == pytest.approx((3 / 4, 3 / 6, 3 / 5))
    assert tuple(semantic_density(solution[::-1], generated)) == pytest.approx((2 / 6, 2 / 4, 2 / 5))
    assert tuple(semantic_density(generated, solution, kind="token")) == pytest.approx((3 / 4, 3 / 6, 3 / 5))
    # Bigrams: ab bc cd against ba ab bd dd de: one in common.
    found = semantic_density(generated, solution, kind="token", n=2, beta=2.0)
    assert tuple(found) == pytest.approx((1 / 3, 1 / 5, 5 * (1 / 15) / (4 / 3 + 1 / 5)))


def test_repetition_is_clipped() -> None:
    assert tuple(semantic_density(["x"] * 10, ["x", "y"], kind="token")) == pytest.approx((0.1, 0.5, 1 / 6))
    assert tuple(semantic_density(["x"] * 10, ["x", "y"])) == pytest.approx((0.1, 0.5, 1 / 6))


@pytest.mark.parametrize("kind", ["rouge_l", "token"])
def test_empty_sides_and_no_overlap_are_zero(kind: Any) -> None:
    for generated, solution in (([], ["a"]), (["a"], []), ([], []), (["a"], ["b"])):
        assert tuple(semantic_density(generated, solution, kind=kind)) == (0.0, 0.0, 0.0)
    assert tuple(semantic_density(["a"], ["a"], kind="token", n=2)) == (0.0, 0.0, 0.0)  # shorter than a bigram


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bleu"}, "`kind` must be one of token, rouge_l, got 'bleu'"),
        ({"kind": "token", "n": 0}, "`n` must be at least 1"),
        ({"kind": "rouge_l", "n": 2}, "1 with kind='rouge_l', got 2"),
        ({"beta": 0.0}, "`beta` must be a finite number above 0, got 0.0"),
        ({"beta": -1.0}, "`beta` must be a finite number above 0"),
        ({"beta": math.inf}, "`beta` must be a finite number above 0"),
        ({"beta": math.nan}, "`beta` must be a finite number above 0"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        semantic_density(["a"], ["a"], **options)
