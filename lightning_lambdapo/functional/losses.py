r"""The policy loss: clipped surrogate, KL penalty, aggregation over global denominators.

Sources: PPO (arXiv 1707.06347), GRPO (2402.03300), DAPO (2503.14476: asymmetric clipping, token mean), Dr. GRPO
(2503.20783: constant denominator), GSPO (2507.18071: sequence ratio). k1, k2, k3: Schulman 2020, "Approximating KL".
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lambdapo.functional.importance import (
    LARGEST_LOG_RATIO,
    Correction,
    CorrectionLevel,
    ImportanceStatistics,
    importance_weights,
)
from lightning_lambdapo.functional.masking import (
    check_choice,
    check_same_shape,
    kept_values,
    masked_mean,
    masked_sum,
)

Level = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss and the statistics to log with it. Only the loss has a gradient.

    Attributes:
        loss: scalar, with gradient.
        mean_kl: scalar, mean of the KL estimator over the masked tokens. None without reference log-probs.
        clip_fraction: scalar, share of masked tokens where clipping binds.
        ratio_max: scalar, largest importance ratio of a masked token, or 0 where there is none.
        importance: sums about the ratio of scorer and sampler. None without ``behavior_logprobs``.
    """

    loss: Tensor
    mean_kl: Tensor | None
    clip_fraction: Tensor
    ratio_max: Tensor
    importance: ImportanceStatistics | None = None


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    level: Level = "token",
    kl_coef: float = 0.0,
    kl: KLEstimator = "k3",
    aggregation: Aggregation = "token",
    max_new_tokens: int | None = None,
    token_count: int | None = None,
    row_count: int | None = None,
    behavior_logprobs: Tensor | None = None,
    importance_correction: Correction = "truncate",
    importance_cap: float = 2.0,
    importance_correction_level: CorrectionLevel = "token",
) -> LossOutput:
    r"""Loss of one part of an optimizer step.

    With the counts of the whole step, the losses of its parts add up to the loss of the step.

    Per token, with :math:`r = \exp(\log \pi - \log \pi_{old})`, at most :math:`e^{60}`:

    .. math:: -\min(r A, clip(r, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A) + \beta\, kl

    and with :math:`d = \log \pi_{ref} - \log \pi`: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
    ``aggregation="token"`` divides the sum over masked tokens by their number. ``"sequence"`` is the mean over rows of
    each row's mean. ``"constant"`` divides the sum by rows times ``max_new_tokens``.

    With ``behavior_logprobs`` the surrogate term, and never the KL term, is multiplied by the constant weight
    :math:`\min(\pi_{old} / \pi_{sampler}, c)`, see :func:`importance_weights`. The denominators stay as they are.

    Args:
        logprobs: ``(N, T)`` float with gradient.
        old_logprobs: ``(N, T)`` float, before the first update. ``logprobs.detach()`` on-policy.
        ref_logprobs: ``(N, T)`` float, or None for no KL term.
        advantages: ``(N,)`` float.
        mask: ``(N, T)`` bool. All False in invalid rows. Values in masked-out places have no effect.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        level: ratio per ``"token"``, or exp of the length-normalised log-ratio of the ``"sequence"``.
        kl_coef: coefficient beta.
        kl: the estimator.
        aggregation: the denominator.
        max_new_tokens: needed by ``"constant"``.
        token_count: masked tokens of the whole optimizer step, over all parts and ranks. None counts this call's.
        row_count: rows with a non-empty mask of the whole step. None counts this call's.
        behavior_logprobs: ``(N, T)`` float, as the sampler recorded them. None for no importance correction.
        importance_correction: weights above the cap are lowered to it (``"truncate"``), or are 0 (``"mask"``, also
            below the cap's inverse).
        importance_cap: the cap :math:`c`, above 1.
        importance_correction_level: weight per ``"token"``, or one for the ``"sequence"``.

    Returns:
        Loss and statistics. Without a masked token the loss is 0, with a graph.

    Raises:
        ValueError: different shapes, unknown names, clipping distances out of range, ``"constant"`` without
            ``max_new_tokens``, ``kl_coef`` without ``ref_logprobs``, a cap that is not above 1.

    Example:
        >>> logprobs, advantages = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]]), torch.tensor([1.0, -0.5])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> policy_loss(logprobs, logprobs, None, advantages, mask).loss  # -(1 + 1 - 0.5) / 3
        tensor(-0.5000)
    """
    check_choice("level", level, get_args(Level))
    check_choice("kl", kl, get_args(KLEstimator))
    check_choice("aggregation", aggregation, get_args(Aggregation))
    tokens_per_row = max_new_tokens if aggregation == "constant" else 1
    if tokens_per_row is None or tokens_per_row < 1:
        raise ValueError(
            f'`max_new_tokens` must be at least 1 with aggregation="constant", got {max_new_tokens}, because it is '
            "in the denominator."
        )
    check_clipping(clip_low, clip_high)
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"`kl_coef` is {kl_coef} and `ref_logprobs` is None, but a KL term needs them.")
    check_same_shape(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        ref_logprobs=logprobs if ref_logprobs is None else ref_logprobs,
    )
    if logprobs.ndim != 2 or advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"`logprobs` must have shape (N, T) and `advantages` (N,), got {tuple(logprobs.shape)} and "
            f"{tuple(advantages.shape)}."
        )
    mask = mask.bool()
    # Junk is replaced before exp, not multiplied by 0 after it, because 0 * inf is NaN, also in the gradient.
    logprobs = kept_values(logprobs, mask)
    log_ratio = logprobs - kept_values(old_logprobs, mask).detach()
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, mask, -1).unsqueeze(-1).expand_as(log_ratio)
    # An infinite ratio times 0 would be NaN: times a zero advantage, or times the zero gradient of a clipped term.
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    weight = kept_values(advantages.detach().unsqueeze(-1).expand_as(mask), mask)
    surrogate = ratio * weight
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * weight
    per_token = -torch.minimum(surrogate, clipped)
    importance = None
    if behavior_logprobs is not None:
        correction, importance = importance_weights(
            old_logprobs,
            behavior_logprobs,
            mask,
            correction=importance_correction,
            cap=importance_cap,
            level=importance_correction_level,
        )
        per_token = correction * per_token
    mean_kl = None
    if ref_logprobs is not None:
        d = kept_values(ref_logprobs, mask).detach() - logprobs
        penalty = -d if kl == "k1" else d.square() / 2 if kl == "k2" else d.expm1() - d
        mean_kl = masked_mean(penalty.detach(), mask)
        if kl_coef:
            per_token = per_token + kl_coef * penalty
    total = masked_mean(per_token, mask, -1).sum() if aggregation == "sequence" else masked_sum(per_token, mask)
    if aggregation == "token":
        count = int(mask.sum()) if token_count is None else token_count
    else:
        count = int(mask.any(-1).sum()) if row_count is None else row_count
    loss = total / max(count * tokens_per_row, 1)
    with torch.no_grad():
        clip_fraction = masked_mean((surrogate > clipped).to(ratio), mask)
        ratio_max = torch.where(mask, ratio, 0.0).max() if mask.any() else ratio.new_zeros(())
    return LossOutput(loss, mean_kl, clip_fraction, ratio_max, importance)


def check_clipping(clip_low: float, clip_high: float) -> None:
    """Raise ``ValueError`` for clipping distances out of range."""
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"`clip_low` must be in [0, 1] and `clip_high` at least 0, got {clip_low} and {clip_high}. The "
            "ratio is clipped to [1 - clip_low, 1 + clip_high]."
        )
