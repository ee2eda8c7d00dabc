"""The density reward: its cut, its measure, its None; the overlap itself is tested with the function."""

from typing import Any

import pytest

from lightning_lambdapo.rewards import RewardInputs, SemanticDensityReward
from lightning_lambdapo.rewards.semantic_density import Measure


def judge(reward: SemanticDensityReward, completions: list[str], references: list[str | None]) -> list[float | None]:
    count = len(completions)
    return reward(
        RewardInputs(["?"] * count, completions, [None] * count, references, [1] * count, [False] * count, [{}] * count)
    )


def test_measures_by_hand() -> None:
    # trace a b c d, reference a c e: the longest common subsequence a c has 2, so p = 2/4, r = 2/3, F = 2pr/(p+r) = 4/7
    expected: dict[Measure, float] = {"precision": 1 / 2, "recall": 2 / 3, "f": 4 / 7}
    for measure, value in expected.items():
        assert judge(SemanticDensityReward(measure=measure), ["a b c d"], ["a c e"]) == [
            pytest.approx(value, abs=1e-12)
        ]


def test_kind_n_and_beta_arrive() -> None:
    # bigrams ab bc cd against ab bc ce, 2 of 3; swapped words keep their unigrams
    assert judge(SemanticDensityReward(kind="token", n=2), ["a b c d"], ["a b c e"]) == [pytest.approx(2 / 3)]
    assert judge(SemanticDensityReward(kind="token"), ["b a"], ["a b"]) == [1.0]
    assert judge(SemanticDensityReward(kind="rouge_l"), ["b a"], ["a b"]) == [0.5]
    # p = 1/2, r = 2/3, beta 2: 5pr / (4p + r) = (5/3) / (8/3)
    assert judge(SemanticDensityReward(beta=2.0), ["a b c d"], ["a c e"]) == [pytest.approx(5 / 8)]


def test_no_reference_is_not_applicable_and_an_empty_trace_is_zero() -> None:
    assert judge(SemanticDensityReward(), ["a", "a", "", "#### a"], [None, "", "a", "a"]) == [None, None, 0.0, 0.0]


def test_answers_are_cut_off_both_texts() -> None:
    assert judge(
        SemanticDensityReward(), ["a b #### 7", r"a b \boxed{c}"], ["a b #### 9", "a b <answer>d</answer>"]
    ) == [1.0, 1.0]


def test_each_row_meets_its_own_reference_and_each_reference_is_read_once() -> None:
    seen: list[str] = []

    def words(text: str) -> list[str]:
        seen.append(text)
        return text.split()

    reward = SemanticDensityReward(tokenizer=words)
    assert judge(reward, ["x", "y", "x", "y"], ["x", "x", "y", "y"]) == [1.0, 0.0, 0.0, 1.0]
    assert len(seen) == 6


def test_it_declares_what_it_needs() -> None:
    reward = SemanticDensityReward()
    assert (reward.requires, reward.weight, reward.name) == (("references",), 0.2, "semantic_density")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "bleu"}, "`kind`.*'bleu'"),
        ({"n": 2}, "`n`.*2"),
        ({"beta": 0.0}, "`beta`.*0.0"),
        ({"measure": "f1"}, "`measure`.*'f1'"),
    ],
)
def test_bad_settings_are_errors(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemanticDensityReward(**setting)
