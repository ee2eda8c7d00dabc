import dataclasses
import math
import random

import pytest
import tiny
import torch

from lightning_lambdapo.config import EvaluationConfig, SamplingConfig
from lightning_lambdapo.datatypes import Rollout
from lightning_lambdapo.evaluation.evaluator import Evaluation
from lightning_lambdapo.evaluation.judging import judge_rollout
from lightning_lambdapo.evaluation.results import statistics
from lightning_lambdapo.rewards import AccuracyReward, FormatReward, SemanticDensityReward


def rollout(texts: list[str]) -> Rollout:
    mask = torch.tensor([[True] * (index % 3 + 1) + [False] * (2 - index % 3) for index in range(len(texts))])
    return Rollout(
        completion_ids=torch.full(mask.shape, 5),
        completion_mask=mask,
        sampling_logprobs=torch.zeros(mask.shape),
        entropy=torch.where(mask, 0.5, 99.0),
        truncated=torch.tensor([index == 0 for index in range(len(texts))]),
        texts=texts,
    )


def test_accuracy_in_all_its_forms() -> None:
    """Gold is 7. First prompt: 7, 9, 9 (majority wrong). Second: 7, 8, 8.5 (right: a tie). Third: no answer."""
    rewards = [AccuracyReward(), FormatReward(style="hash", weight=0.5), SemanticDensityReward(weight=0.0)]
    config = EvaluationConfig(num_samples=3, k=[1, 2, 3], sampling=SamplingConfig(temperature=1.0))
    evaluation = Evaluation(config, rewards)
    batch = tiny.batch([[3], [4], [5]])._replace(answers=["7", "7", None], references=["a + b", None, None])
    texts = ["a + b\n#### 7", "#### 9", "so 9", "so 7", "so 8", "so 8.5", "x", "y", "z"]
    sampled = rollout(texts)
    evaluation.update(batch, sampled, judge_rollout(rewards, batch, sampled))
    found = evaluation.compute()
    assert found["avg_at_3"] == pytest.approx(2 / 6)
    assert found["pass_at_1"] == pytest.approx(1 / 3)
    assert found["pass_at_2"] == pytest.approx(2 / 3)
    assert found["pass_at_3"] == 1.0
    assert found["maj_at_2"] == 1.0  # ties go to the first
    assert found["maj_at_3"] == pytest.approx(1 / 2)  # 9 wrong, 7 right
    assert found["reward/accuracy"] == pytest.approx(2 / 6)
    assert found["reward/format"] == pytest.approx(2 / 9)
    assert found["reward"] == pytest.approx((2 + 2 * 0.5) / 9)
    assert found["density_recall"] == pytest.approx(1 / 3)  # of one prompt's three rows, the first has it all
    assert (found["completion_length"], found["completion_length_max"]) == (2.0, 3.0)
    assert found["entropy"] == pytest.approx(0.5)
    assert found["truncated"] == pytest.approx(1 / 9)
    evaluation.reset()
    evaluation.update(batch, sampled, judge_rollout(rewards, batch, sampled))
    assert evaluation.compute() == found  # nothing of the first round is left


def test_outcomes_add_up_to_the_metrics() -> None:
    """What reports are made of, against what is logged, over several batches."""
    source = random.Random(4)
    rewards = [AccuracyReward(), FormatReward(style="hash"), SemanticDensityReward()]
    config = EvaluationConfig(num_samples=4, k=[1, 2, 4], sampling=SamplingConfig(temperature=1.0))
    evaluation = Evaluation(config, rewards)
    found = []
    for _ in range(5):
        batch = tiny.batch([[3], [4], [5]])._replace(answers=["7", "8", None], references=["a", None, None])
        sampled = rollout([source.choice(["#### 7", "so 7.0", "#### 8", "8", "none"]) for _ in range(12)])
        found += evaluation.update(batch, sampled, judge_rollout(rewards, batch, sampled))
    logged = evaluation.compute()
    assert 0 < logged["maj_at_4"] < logged["pass_at_4"]
    expected = statistics(found, config.k)
    assert len(expected) == 11
    for name, estimate in expected.items():
        assert estimate.value == pytest.approx(logged[name], abs=1e-6), name


def test_without_an_accuracy_reward_there_is_no_accuracy() -> None:
    rewards = [FormatReward(style="hash")]
    evaluation = Evaluation(EvaluationConfig(), rewards)
    batch = tiny.batch([[3], [4]])._replace(references=[None, None])
    sampled = rollout(["#### 7", "7"])
    evaluation.update(batch, sampled, judge_rollout(rewards, batch, sampled))
    found = evaluation.compute()
    assert found["reward"] == 0.5
    assert not [name for name in found if name.startswith(("pass", "maj", "avg", "density"))]


def test_a_statistic_that_is_no_number_is_shown() -> None:
    """Only a metric without data is omitted: an entropy of NaN is what a broken policy has."""
    rewards = [FormatReward(style="hash")]
    evaluation = Evaluation(EvaluationConfig(), rewards)
    batch = tiny.batch([[3], [4]])._replace(references=[None, None])
    sampled = rollout(["#### 7", "7"])
    sampled = dataclasses.replace(sampled, entropy=torch.full_like(sampled.sampling_logprobs, math.nan))
    evaluation.update(batch, sampled, judge_rollout(rewards, batch, sampled))
    found = evaluation.compute()
    assert [name for name, value in found.items() if math.isnan(value)] == ["entropy"]
    assert "pass_at_1" not in found


def test_truncated_rows_are_invalid_when_masked() -> None:
    rewards = [FormatReward(style="hash")]
    batch = tiny.batch([[3]])
    sampled = rollout(["#### 7", "7"])
    assert judge_rollout(rewards, batch, sampled).valid.tolist() == [[True, True]]
    assert judge_rollout(rewards, batch, sampled, mask_truncated=True).valid.tolist() == [[False, True]]
