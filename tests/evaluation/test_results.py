"""What a report says of outcomes, by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_lambdapo.evaluation.estimators import Estimate
from lightning_lambdapo.evaluation.results import Outcome, markdown, outcome, results, statistics, write


def made(prompt_id: int, subject: object, accuracy: list[float], votes: list[str | None], **more: Any) -> Outcome:
    settings: dict[str, Any] = {"lengths": [1, 2, 3], "truncated": [prompt_id == 0, False, False]}
    parts = {"accuracy": accuracy, "shape": [0.5, math.nan, 1.0] if prompt_id else [math.nan] * 3}
    return outcome(prompt_id, subject=subject, parts=parts, votes=votes, **(settings | more))


#: The first prompt's majority is wrong, the second's is a tie that the first answer wins, the third has no answer.
OUTCOMES = [
    made(0, "algebra", [1.0, 0.0, 0.0], ["7", "9", "9"]),
    made(1, "sets", [1.0, 0.0, 0.4], ["7", "8", "8.5"], lengths=[9, 9, 9]),
    made(2, " algebra ", [math.nan, 0.0, 0.0], ["x", "y", None]),
]


def values(found: dict[str, Estimate]) -> dict[str, float]:
    return {name: each.value for name, each in found.items()}


def test_an_outcome_is_small_and_says_it_all() -> None:
    assert OUTCOMES[1] == Outcome(
        prompt_id=1,
        subject="sets",
        correct=[True, False, False],
        votes=[0, 1, 2],
        lengths=[9, 9, 9],
        truncated=[False, False, False],
        rewards={"accuracy": (1.4, 3), "shape": (1.5, 2)},
    )
    assert (OUTCOMES[0].votes, OUTCOMES[0].rewards["shape"]) == ([0, 1, 1], (0, 0))
    assert (OUTCOMES[2].correct, OUTCOMES[2].votes, OUTCOMES[2].subject) == (None, [0, 1, None], "algebra")
    for subject in (None, "", " ", ["a"], {"a": 1}):
        assert made(0, subject, [1.0] * 3, [None] * 3).subject is None
    assert made(0, 4, [1.0] * 3, [None] * 3).subject == "4"


def test_statistics_by_hand() -> None:
    expected = {
        "avg_at_3": 2 / 6,
        "pass_at_1": 1 / 3,
        "pass_at_2": 2 / 3,
        "pass_at_3": 1.0,
        "maj_at_2": 1.0,
        "maj_at_3": 1 / 2,
        "completion_length": (6 + 27 + 6) / 9,
        "truncated": 1 / 9,
        "reward/accuracy": 2.4 / 8,
        "reward/shape": (1.5 + 1.5) / 4,
    }
    found = statistics(OUTCOMES, [1, 2, 3])
    assert values(found) == pytest.approx(expected)
    assert (found["maj_at_3"].low, found["maj_at_3"].high) == (0.0, 1.0)  # of two prompts, one right
    assert found["truncated"].low == 0.0
    assert found["truncated"].high == pytest.approx(2 / 9, abs=0.12)


def test_what_is_not_known_is_left_out() -> None:
    bare = outcome(0, subject=None, parts={}, votes=[None], lengths=None, truncated=None)
    assert statistics([bare], [1]) == {}
    assert statistics([*OUTCOMES, bare], [1])["completion_length"] == statistics(OUTCOMES, [1])["completion_length"]


def test_unlike_numbers_of_samples() -> None:
    short = outcome(5, subject=None, parts={"accuracy": [1.0]}, votes=["7"], lengths=[4], truncated=[True])
    found = values(statistics([OUTCOMES[0], short], [1]))
    assert "avg_at_3" not in found
    assert found["pass_at_1"] == pytest.approx((1 / 3 + 1) / 2)  # prompts count alike
    assert found["truncated"] == 2 / 4  # and rows alike
    with pytest.raises(ValueError, match=r"k = 2 needs 2 samples of each prompt, and prompt 5 has 1\. Choose"):
        statistics([OUTCOMES[0], short], [1, 2])


def test_subjects_have_their_own_prompts() -> None:
    found = results(OUTCOMES, [1, 3], {"stage": "test"})
    assert (found["prompts"], found["judged_prompts"], found["completions"]) == (3, 2, 9)
    algebra, sets = found["subjects"]["algebra"], found["subjects"]["sets"]
    assert list(found["subjects"]) == ["algebra", "sets"]
    assert (algebra["prompts"], algebra["judged_prompts"], sets["prompts"]) == (2, 1, 1)
    assert algebra["metrics"]["maj_at_3"] == {"value": 0.0, "low": None, "high": None}
    assert sets["metrics"]["maj_at_3"]["value"] == 1.0
    assert algebra["metrics"]["completion_length"]["value"] == 2.0
    assert sets["metrics"]["completion_length"]["value"] == 9.0
    assert results([made(0, None, [1.0] * 3, ["1"] * 3)], [1], {})["subjects"] == {}
    some = results([OUTCOMES[0], made(9, None, [1.0] * 3, ["1"] * 3)], [1], {})["subjects"]
    assert {name: each["prompts"] for name, each in some.items()} == {"(none)": 1, "algebra": 1}
    with pytest.raises(ValueError, match="no completions"):
        results([], [1], {})


def test_the_order_of_outcomes_has_no_effect() -> None:
    assert results(OUTCOMES, [1, 3], {}) == results(OUTCOMES[::-1], [1, 3], {})


def test_markdown_is_readable() -> None:
    settings = {
        "stage": "test",
        "decoding": {"temperature": 0.6, "max_new_tokens": 48},
        "checkpoint": None,
        "policy": {"greedy": True},
        "data": {"path": "a|b.jsonl"},
    }
    lines = markdown(results(OUTCOMES, [1, 3], settings)).splitlines()
    assert lines[0] == "# Results of test"
    for line in (
        "| decoding | temperature 0.6, max new tokens 48 |",
        "| policy | greedy |",
        "| data | path a\\|b.jsonl |",
        "| prompts | 3, of which 2 could be judged |",
        "| samples per prompt | 3 |",
        "| maj@3 | 0.500 | 0.000 to 1.000 |",
        "| subject | prompts | avg@3 | pass@3 | maj@3 | completion length (tokens) | truncated share |",
        "| sets | 1 | 0.333 | 1.000 | 1.000 | 9.0 | 0.000 |",
    ):
        assert line in lines
    assert not any("checkpoint" in line for line in lines)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    found = results(OUTCOMES, [1, 3], {"stage": "test"})
    (tmp_path / "results-1.md").write_text("mine")
    assert [path.name for path in write(found, tmp_path, "results")] == ["results.json", "results.md"]
    assert [path.name for path in write(found, tmp_path, "results")] == ["results-2.json", "results-2.md"]
    assert (tmp_path / "results-1.md").read_text() == "mine"
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "results.md").read_text() == markdown(found)
