r"""Advantages: pairwise, weighted by the policy's confidence, and the group baselines they are compared with.

Sources: LambdaPO, arXiv 2605.19416, and LamPO, arXiv 2605.21235. Both are withdrawn, and this is an independent
implementation of what they describe. LambdaRank: Burges 2010, MSR-TR-2010-82. GRPO: arXiv 2402.03300. Dr. GRPO: arXiv
2503.20783. RLOO: arXiv 2402.14740.
"""

import math
import sys
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lambdapo.functional.masking import (
    at_least_float32,
    check_choice,
    check_same_shape,
    masked_mean,
    masked_sum,
)

Weighting = Literal["uniform", "confidence", "agreement", "lambdarank"]
Reduction = Literal["sum", "mean", "weighted_mean"]
Scale = Literal["none", "group", "batch"]
GroupEstimator = Literal["grpo", "dr_grpo", "rloo"]
Temperature = float | Literal["group_std"]
Score = Literal["mean", "sum"]

_STD_EPS = 1e-4
_TEMPERATURE_EPS = 1e-6
_WEIGHT_EPS = 1e-12


@torch.no_grad()
def sequence_scores(logprobs: Tensor, mask: Tensor, *, score: Score = "mean") -> Tensor:
    r"""Confidence: the log-probability of each completion under the policy that sampled it.

    .. math:: s_i = \sum_t \log \pi_{old}(o_{i,t} \mid q, o_{i,<t})

    over the masked tokens, divided by their number under ``score="mean"``. Sums over whole completions differ by tens
    of nats. The sigmoid of such a difference is 0 or 1, and orders a group by length.

    Args:
        logprobs: ``(N, T)`` float, recorded while sampling.
        mask: ``(N, T)`` bool.
        score: ``"mean"`` or ``"sum"``.

    Returns:
        ``(N,)`` float32, or float64 for float64 input, without gradient. 0 for an empty row.

    Raises:
        ValueError: unknown ``score`` or different shapes.

    Example:
        >>> logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.5, -2.0]])
        >>> mask = torch.tensor([[True, True, False], [True, True, True]])
        >>> sequence_scores(logprobs, mask)
        tensor([-1.5000, -1.0000])
    """
    check_choice("score", score, get_args(Score))
    check_same_shape(logprobs=logprobs, mask=mask)
    reduce = masked_mean if score == "mean" else masked_sum
    return reduce(at_least_float32(logprobs), mask.bool(), -1)


@torch.no_grad()
def pairwise_weights(
    rewards: Tensor,
    scores: Tensor,
    *,
    weighting: Weighting = "confidence",
    temperature: Temperature = "group_std",
    valid: Tensor | None = None,
) -> Tensor:
    r"""Weight of the comparison of rollout ``i`` with its peer ``j``.

    With :math:`d_{ij} = (s_i - s_j) / \tau`:

    ============  =========================================  ========================================================
    weighting     :math:`w_{ij}`                             reading
    ============  =========================================  ========================================================
    uniform       1                                          group-mean baseline
    confidence    :math:`\sigma(d_{ij})`                     LamPO's reported form, :math:`w_{ij} + w_{ji} = 1`
    agreement     :math:`\sigma(sign(R_i - R_j) d_{ij})`     the policy's probability of the established preference
    lambdarank    :math:`\sigma(-sign(R_i - R_j) d_{ij})`    a pair the policy already ranks right counts less
    ============  =========================================  ========================================================

    Args:
        rewards: ``(B, G)`` float.
        scores: ``(B, G)`` float, the confidences of :func:`sequence_scores`.
        weighting: one of the above.
        temperature: a finite number above 0, or ``"group_std"``: the population standard deviation of the group's
            valid confidences, at least 1e-6. With ``G = 2``, ``"group_std"`` makes ``|d| = 2`` whatever the gap.
        valid: ``(B, G)`` bool. None means all.

    Returns:
        ``(B, G, G)``, 0 on the diagonal and in rows and columns of invalid rollouts, without gradient.

    Raises:
        ValueError: unknown names, different shapes, fewer than two rollouts, a temperature that is not above 0, or a
            valid reward or confidence that is not finite or is too large to be squared.

    Example:
        >>> pairwise_weights(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=1.0)
        tensor([[[0.0000, 0.5000],
                 [0.5000, 0.0000]]])
    """
    check_weighting(weighting, temperature)
    rewards, scores, valid = prepare_groups(rewards, scores, valid)
    return _weights(rewards, scores, valid, weighting, temperature)


@torch.no_grad()
def lambda_advantages(
    rewards: Tensor,
    scores: Tensor,
    *,
    weighting: Weighting = "confidence",
    temperature: Temperature = "group_std",
    reduction: Reduction = "mean",
    center: bool = False,
    scale: Scale = "none",
    valid: Tensor | None = None,
    reward_std: Tensor | float | None = None,
) -> Tensor:
    r"""Advantage of each rollout: reward differences against every peer, weighted by the policy's confidence.

    .. math:: A_i = \sum_{j \ne i} w_{ij} (R_i - R_j)

    over the valid peers of the group. ``reduction="mean"`` divides the sum by their number, ``"weighted_mean"`` by
    :math:`\sum_j w_{ij}`. Then ``center`` subtracts the group's mean, and ``scale`` divides by a standard deviation of
    rewards plus 1e-4. A group whose valid rewards are all equal, or that has fewer than two valid rows, gets exact
    zeros.

    Args:
        rewards: ``(B, G)`` float.
        scores: ``(B, G)`` float, the confidences of :func:`sequence_scores`.
        weighting: see :func:`pairwise_weights`.
        temperature: see :func:`pairwise_weights`.
        reduction: ``"sum"``, ``"mean"`` or ``"weighted_mean"``.
        center: subtract the mean over the group's valid rows.
        scale: divide by the unbiased standard deviation of the group's valid rewards (``"group"``), of all valid
            rewards (``"batch"``), or by nothing (``"none"``).
        valid: ``(B, G)`` bool. An invalid row gets 0 and is no peer of other rows. None means all valid.
        reward_std: the global unbiased standard deviation for ``scale="batch"``. None takes that of ``rewards``.

    Returns:
        ``(B, G)`` float32, or float64 where an input is, without gradient.

    Raises:
        ValueError: as for :func:`pairwise_weights`, and for unknown ``reduction`` or ``scale``.

    Example:
        >>> lambda_advantages(torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1, 3), temperature=1.0)
        tensor([[ 0.5000, -0.2500, -0.2500]])
    """
    check_weighting(weighting, temperature)
    check_choice("reduction", reduction, get_args(Reduction))
    check_choice("scale", scale, get_args(Scale))
    rewards, scores, valid = prepare_groups(rewards, scores, valid)
    weights = _weights(rewards, scores, valid, weighting, temperature)
    advantages = (weights * _differences(rewards)).sum(-1)
    if reduction == "mean":
        advantages = advantages / (valid.sum(-1, keepdim=True) - 1).clamp(min=1)
    elif reduction == "weighted_mean":
        mass = weights.sum(-1)
        advantages = torch.where(mass > _WEIGHT_EPS, advantages / mass.clamp(min=_WEIGHT_EPS), 0.0)
    if center:
        advantages = advantages - masked_mean(advantages, valid, -1).unsqueeze(-1)
    if scale == "group":
        advantages = advantages / (_unbiased_std(rewards, valid, -1).unsqueeze(-1) + _STD_EPS)
    elif scale == "batch":
        std = _unbiased_std(rewards.flatten(), valid.flatten(), -1) if reward_std is None else reward_std
        advantages = advantages / (torch.as_tensor(std, dtype=rewards.dtype, device=rewards.device) + _STD_EPS)
    # Equal rewards differ by exactly 0, so the advantages of their group are already exact zeros.
    return torch.where(valid, advantages, 0.0)


@torch.no_grad()
def group_advantages(rewards: Tensor, *, estimator: GroupEstimator, valid: Tensor | None = None) -> Tensor:
    r"""The baselines that LambdaPO is compared with.

    ``grpo``: :math:`(R - \bar R) / (std + 10^{-4})` with the unbiased standard deviation. ``dr_grpo``:
    :math:`R - \bar R`. ``rloo``: R minus the mean of the other valid rows.

    Args:
        rewards: ``(B, G)`` float.
        estimator: one of the three.
        valid: ``(B, G)`` bool. None means all.

    Returns:
        ``(B, G)``. Exact zeros for groups of equal rewards or with fewer than two valid rows.

    Raises:
        ValueError: unknown estimator, different shapes, fewer than two rollouts, or a valid reward that is not finite
            or is too large to be squared.

    Example:
        >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), estimator="rloo")
        tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    check_choice("estimator", estimator, get_args(GroupEstimator))
    rewards, _, valid = prepare_groups(rewards, rewards, valid)
    advantages = rewards - masked_mean(rewards, valid, -1).unsqueeze(-1)
    if estimator == "grpo":
        advantages = advantages / (_unbiased_std(rewards, valid, -1).unsqueeze(-1) + _STD_EPS)
    elif estimator == "rloo":
        count = valid.sum(-1, keepdim=True)
        advantages = advantages * count / (count - 1).clamp(min=1)
    return torch.where(valid & rewards_differ(rewards, valid).unsqueeze(-1), advantages, 0.0)


def check_weighting(weighting: Weighting, temperature: Temperature, *, prefix: str = "") -> None:
    """Raise ``ValueError`` for settings that :func:`pairwise_weights` refuses. ``prefix`` goes before their names."""
    check_choice(f"{prefix}weighting", weighting, get_args(Weighting))
    if temperature != "group_std" and (isinstance(temperature, str) or not 0 < temperature <= sys.float_info.max):
        raise ValueError(f'`{prefix}temperature` must be a finite number above 0 or "group_std", got {temperature!r}.')


def rewards_differ(rewards: Tensor, valid: Tensor) -> Tensor:
    """Whether two valid rewards of a group differ, ``(B,)`` bool, from ``(B, G)`` rewards and their validity.

    Compares maximum and minimum, because equal rewards minus their rounded mean may differ from 0.
    """
    largest = torch.where(valid, rewards, -math.inf).amax(-1)
    smallest = torch.where(valid, rewards, math.inf).amin(-1)
    return largest > smallest


def prepare_groups(rewards: Tensor, scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Check, convert to one float type, and put 0 in invalid places, so that junk there has no effect."""
    check_same_shape(rewards=rewards, scores=scores, valid=rewards if valid is None else valid)
    if rewards.ndim != 2:
        raise ValueError(f"`rewards` must have shape (B, G), got {tuple(rewards.shape)}.")
    if rewards.shape[1] < 2:
        raise ValueError(
            f"`group_size` must be at least 2, got {rewards.shape[1]}, because a pairwise advantage needs a peer."
        )
    dtype = torch.float64 if torch.float64 in (rewards.dtype, scores.dtype) else torch.float32
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    largest = torch.finfo(dtype).max ** 0.5 / 1000  # standard deviations sum squares over a batch
    prepared = []
    for name, values in (("rewards", rewards), ("scores", scores)):
        kept = torch.where(valid, values.to(dtype), 0.0)
        bad = ~(kept.abs() <= largest)  # NaN too
        if bad.any():
            place = tuple(bad.nonzero()[0].tolist())
            value = kept[place].item()
            advice = (
                f"Its square does not fit {dtype}: keep it below {largest:.0e}"
                if math.isfinite(value)
                else "Mark a row that has none as invalid"
            )
            raise ValueError(f"`{name}` must be finite where valid, got {value} at {place}. {advice}.")
        prepared.append(kept)
    return prepared[0], prepared[1], valid


def _differences(values: Tensor) -> Tensor:
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def _weights(rewards: Tensor, scores: Tensor, valid: Tensor, weighting: Weighting, temperature: Temperature) -> Tensor:
    pairs = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    pairs = pairs & ~torch.eye(valid.shape[-1], dtype=torch.bool, device=valid.device)
    if weighting == "uniform":
        return pairs.to(rewards)
    gap = _differences(scores)
    if weighting == "agreement":
        gap = gap * _differences(rewards).sign()
    elif weighting == "lambdarank":
        gap = gap * -_differences(rewards).sign()
    return torch.where(pairs, torch.sigmoid(gap / _tau(scores, valid, temperature)), 0.0)


def _tau(scores: Tensor, valid: Tensor, temperature: Temperature) -> Tensor | float:
    if temperature != "group_std":
        return max(float(temperature), torch.finfo(scores.dtype).tiny)  # one that rounds to 0 would give 0 / 0
    deviations = scores - masked_mean(scores, valid, -1).unsqueeze(-1)
    std = masked_mean(deviations.square(), valid, -1).sqrt()
    return std.clamp(min=_TEMPERATURE_EPS)[:, None, None]


def _unbiased_std(values: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation over the valid values, 0 for a single one."""
    count = valid.sum(dim)
    deviations = values - masked_mean(values, valid, dim).unsqueeze(dim)
    return (masked_sum(deviations.square(), valid, dim) / (count - 1).clamp(min=1)).sqrt()
