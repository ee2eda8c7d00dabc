r"""Importance correction: weights for tokens whose sampler is not exactly the policy that learns from them.

Engine and learning pass run other kernels, batch shapes or precisions, so they give the same token slightly different
probabilities. Without a correction the gradient is that of the sampler's policy, a bias that nobody sees.

Sources: truncated importance sampling, Ionides 2008, and for language models Yao et al. 2025, "Your Efficient RL
Framework Secretly Brings You Off-Policy RL Training" (fengyao.notion.site/off-policy-rl). Masking: IcePop (Ring-1T,
arXiv 2510.18855) and verl's rollout correction, whose lower bound is the inverse of the upper one. Effective sample
size: Kong 1992. k3: Schulman 2020, "Approximating KL".
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lambdapo.functional.masking import check_choice, check_same_shape, kept_values

Correction = Literal["truncate", "mask"]
CorrectionLevel = Literal["token", "sequence"]

LARGEST_LOG_RATIO = 60.0


@dataclass(frozen=True, slots=True)
class ImportanceStatistics:
    r"""Sums over units, which are tokens at the level ``"token"`` and rows at ``"sequence"``. Scalars without gradient.

    The sums of a step's parts add up to those of the step. Then the mean raw ratio is ``ratio_sum / finite``, the
    capped share ``capped / count``, the KL ``kl_sum / kl_tokens``, and the effective sample size, as a share of the
    units, :math:`(\sum w)^2 / (n \sum w^2)` from ``weight_sum``, ``weight_square_sum`` and ``count``.

    Attributes:
        count: units.
        finite: units with a finite ratio.
        ratio_sum: sum of their ratios before any cap, each at most :math:`e^{60}`.
        ratio_max: the largest of them. 0 where there is none.
        weight_sum: sum of the weights.
        weight_square_sum: sum of their squares.
        capped: units whose weight is not their ratio: above the cap, masked, or not finite.
        kl_tokens: tokens with a finite ratio, at both levels.
        kl_sum: sum over them of the k3 estimator of KL(sampler || scorer), ``r - 1 - log r``.
    """

    count: Tensor
    finite: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor
    weight_sum: Tensor
    weight_square_sum: Tensor
    capped: Tensor
    kl_tokens: Tensor
    kl_sum: Tensor


def importance_weights(
    old_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    correction: Correction = "truncate",
    cap: float = 2.0,
    level: CorrectionLevel = "token",
) -> tuple[Tensor, ImportanceStatistics]:
    r"""Weight of each token's surrogate term, from the ratio of scorer and sampler.

    .. math:: \rho_t = \exp(\log \pi_{old}(o_t) - \log \pi_{sampler}(o_t)), \qquad \rho = \prod_t \rho_t

    ``"truncate"`` gives :math:`\min(\rho, c)`. ``"mask"`` gives :math:`\rho` where :math:`1/c \le \rho \le c`, and 0
    elsewhere. At the level ``"sequence"`` every token of a row has the weight of the row's ratio, which is the product
    over its tokens and not a mean. It is the exact ratio of two samplers, and strays from 1 with the row's length.

    Args:
        old_logprobs: ``(N, T)`` float, under the policy before the update, from the learning pass.
        behavior_logprobs: ``(N, T)`` float, as the sampler recorded them.
        mask: ``(N, T)`` bool. Values in masked-out places have no effect.
        correction: ``"truncate"`` or ``"mask"``.
        cap: the cap :math:`c`, above 1. ``math.inf`` never caps.
        level: one ratio per ``"token"`` or per ``"sequence"``.

    Returns:
        ``(N, T)`` weights in float32, or in float64 where an input is, without gradient, and 0 where masked out. A
        ratio that is not finite has the weight 0, as no cap can tell whether it is too large. Then the statistics.

    Raises:
        ValueError: different shapes, unknown names, a cap that is not above 1.

    Example:
        >>> old = torch.tensor([[0.5, 1.0, 1.5, 4.0]]).log()
        >>> importance_weights(old, torch.zeros(1, 4), torch.ones(1, 4).bool(), cap=2.0)[0]
        tensor([[0.5000, 1.0000, 1.5000, 2.0000]])
    """
    check_choice("importance_correction", correction, get_args(Correction))
    check_choice("importance_correction_level", level, get_args(CorrectionLevel))
    check_cap(cap)
    check_same_shape(old_logprobs=old_logprobs, behavior_logprobs=behavior_logprobs, mask=mask)
    with torch.no_grad():
        mask = mask.bool()
        of_tokens = kept_values(old_logprobs, mask) - kept_values(behavior_logprobs, mask)
        units, log_ratio = mask, of_tokens
        if level == "sequence":
            units, log_ratio = mask.any(-1, keepdim=True), of_tokens.sum(-1, keepdim=True)
        finite = units & log_ratio.isfinite()
        ratio = kept_values(log_ratio, finite).clamp(max=LARGEST_LOG_RATIO).exp()
        outside = log_ratio > math.log(cap)
        if correction == "mask":
            outside = outside | (log_ratio < -math.log(cap))
        capped = units & (outside | ~finite)
        bounded = ratio.clamp(max=cap) if correction == "truncate" else ratio.masked_fill(outside, 0.0)
        weights = kept_values(bounded, finite)
        ratios, tokens = kept_values(ratio, finite), mask & of_tokens.isfinite()
        d = kept_values(of_tokens, tokens).clamp(max=LARGEST_LOG_RATIO)
        statistics = ImportanceStatistics(
            count=units.sum(),
            finite=finite.sum(),
            ratio_sum=ratios.sum(),
            ratio_max=ratios.max() if ratios.numel() else ratios.new_zeros(()),
            weight_sum=weights.sum(),
            weight_square_sum=weights.square().sum(),
            capped=capped.sum(),
            kl_tokens=tokens.sum(),
            kl_sum=(d.expm1() - d).sum(),
        )
        return kept_values(weights.expand_as(of_tokens), mask), statistics


def check_cap(cap: float) -> None:
    """Raise ``ValueError`` for a cap that is not above 1."""
    if not cap > 1:
        raise ValueError(
            f"`importance_cap` must be above 1, got {cap}. Ratios of scorer and sampler scatter around 1, so a lower "
            "cap would bind on half of all tokens. Set 2.0, or `.inf` for no cap."
        )
