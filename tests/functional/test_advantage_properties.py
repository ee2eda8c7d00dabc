"""The properties that the pairwise advantage promises, one test each."""

import itertools
import math
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from lightning_lambdapo.functional import group_advantages, lambda_advantages, pairwise_weights

WEIGHTINGS = ["uniform", "confidence", "agreement", "lambdarank"]
REDUCTIONS = ["sum", "mean", "weighted_mean"]


def groups(batch: int = 5, size: int = 6, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(batch, size, dtype=torch.float64, generator=generator)
    scores = torch.randn(batch, size, dtype=torch.float64, generator=generator)
    return rewards, scores


def close(found: Tensor, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=atol, rtol=0.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_permuting_a_group_permutes_its_advantages(weighting: Any, reduction: Any) -> None:
    rewards, scores = groups()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    plain = lambda_advantages(rewards, scores, weighting=weighting, reduction=reduction)
    permuted = lambda_advantages(rewards[:, order], scores[:, order], weighting=weighting, reduction=reduction)
    close(permuted, plain[:, order])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_constant_added_to_rewards_changes_nothing(weighting: Any, reduction: Any) -> None:
    rewards, scores = groups()
    options: dict[str, Any] = {"weighting": weighting, "reduction": reduction}
    close(lambda_advantages(rewards + 3.0, scores, **options), lambda_advantages(rewards, scores, **options))


@pytest.mark.parametrize("weighting", ["uniform", "agreement", "lambdarank"])
def test_symmetric_weights_make_antisymmetric_lambdas_and_sum_to_zero(weighting: Any) -> None:
    rewards, scores = groups()
    weights = pairwise_weights(rewards, scores, weighting=weighting, temperature=0.7)
    close(weights, weights.transpose(1, 2))
    lambdas = weights * (rewards[:, :, None] - rewards[:, None, :])
    close(lambdas, -lambdas.transpose(1, 2))
    for reduction in ("sum", "mean"):
        advantages = lambda_advantages(rewards, scores, weighting=weighting, temperature=0.7, reduction=reduction)
        assert advantages.abs().max() > 0.1
        close(advantages.sum(-1), [0.0] * 5)


def test_confidence_weights_of_a_pair_add_up_to_one() -> None:
    weights = pairwise_weights(*groups())
    close(weights + weights.transpose(1, 2), (1 - torch.eye(6)).expand(5, 6, 6))


def test_confidence_under_sum_adds_up_to_the_tanh_formula() -> None:
    rewards, scores = groups()
    advantages = lambda_advantages(rewards, scores, weighting="confidence", temperature=0.7, reduction="sum")
    for b in range(5):
        r, s = rewards[b].tolist(), scores[b].tolist()
        expected = sum(
            math.tanh((s[i] - s[j]) / 0.7 / 2) * (r[i] - r[j]) for i, j in itertools.combinations(range(6), 2)
        )
        assert abs(expected) > 0.1  # not centred
        close(advantages[b].sum(), expected)


@pytest.mark.parametrize("weighting", ["confidence", "agreement", "lambdarank"])
@pytest.mark.parametrize("case", ["equal scores", "high temperature"])
def test_without_a_preference_of_the_policy_weights_are_uniform(weighting: Any, case: str) -> None:
    rewards, scores = groups()
    temperature: Any = "group_std"
    if case == "equal scores":
        scores = torch.full_like(scores, -1.7)
    else:
        temperature = 1e12
    for reduction, factor in (("sum", 0.5), ("mean", 0.5), ("weighted_mean", 1.0)):
        found = lambda_advantages(
            rewards,
            scores,
            weighting=weighting,
            temperature=temperature,
            reduction=reduction,  # type: ignore[arg-type]
        )
        uniform = lambda_advantages(rewards, scores, weighting="uniform", reduction=reduction)  # type: ignore[arg-type]
        close(found, factor * uniform, 1e-9)


def test_uniform_mean_is_rloo() -> None:
    rewards, scores = groups()
    valid = torch.ones_like(rewards, dtype=torch.bool)
    valid[0, 2] = valid[3, 0] = valid[3, 5] = False
    found = lambda_advantages(rewards, scores, weighting="uniform", reduction="mean", valid=valid)
    close(found, group_advantages(rewards, estimator="rloo", valid=valid))
    close(found[1, 0], rewards[1, 0] - rewards[1, 1:].mean())


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_another_groups_content_changes_nothing(weighting: Any, scale: Any) -> None:
    rewards, scores = groups()
    options: dict[str, Any] = {"weighting": weighting, "scale": scale, "center": True}
    plain = lambda_advantages(rewards, scores, **options)
    rewards[1], scores[1] = rewards[1] * 50, scores[1] - 9
    changed = lambda_advantages(rewards, scores, **options)
    assert torch.equal(changed[[0, 2, 3, 4]], plain[[0, 2, 3, 4]])
    assert not torch.equal(changed[1], plain[1])


def test_batch_scale_sees_the_other_groups() -> None:
    rewards, scores = groups()
    found, plain = (lambda_advantages(rewards, scores, scale=scale) for scale in ("batch", "none"))
    close(found, plain / (reference.unbiased_std(rewards.flatten().tolist()) + 1e-4))


def test_centring_subtracts_the_mean_of_valid_rows() -> None:
    rewards, scores = groups()
    valid = torch.ones_like(rewards, dtype=torch.bool)
    valid[:, 1] = False
    advantages = lambda_advantages(rewards, scores, center=True, valid=valid)
    plain = lambda_advantages(rewards, scores, valid=valid)
    close(advantages.sum(-1), [0.0] * 5)
    close(advantages[:, 0] - advantages[:, 2], plain[:, 0] - plain[:, 2])
    assert (advantages[:, 1] == 0).all()


def test_group_std_with_two_rollouts_is_blind_to_the_gap() -> None:
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for gap in (1e-3, 1.0, 1e4):
        weights = pairwise_weights(rewards, torch.tensor([[0.0, -gap]], dtype=torch.float64))
        close(weights[0, 0, 1], reference.sigmoid(2.0), 1e-9)
