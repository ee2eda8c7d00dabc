r"""The policy loss: clipped surrogate, KL penalty, aggregation over global denominators.

Sources: PPO (arXiv 1707.06347), GRPO (2402.03300), DAPO (2503.14476: asymmetric clipping, token mean), Dr. GRPO
(2503.20783: constant denominator), GSPO (2507.18071: sequence ratio); k1, k2, k3: Schulman 2020, "Approximating KL".
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lambdapo.functional.masking import at_least_float32, check_same_shape, masked_mean, masked_sum

Level = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss and what is worth logging about it.

    Attributes:
        loss: scalar with gradient.
        mean_kl: scalar, mean of the KL estimator over the masked tokens; None without reference log-probs.
        clip_fraction: scalar, share of masked tokens where clipping binds.
        ratio_max: scalar, largest importance ratio of a masked token; 0 where there is none.
    """

    loss: Tensor
    mean_kl: Tensor | None
    clip_fraction: Tensor
    ratio_max: Tensor


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
) -> LossOutput:
    r"""Loss of a part of an optimizer step; with the whole step's counts, the parts' losses add up to the step's.

    Per token, with :math:`r = \exp(\log \pi - \log \pi_{old})`:

    .. math:: -\min(r A, clip(r, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A) + \beta\, kl

    and with :math:`d = \log \pi_{ref} - \log \pi`: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1. ``aggregation``:
    ``"token"`` divides the sum over masked tokens by their number, ``"sequence"`` is the mean over rows of each row's
    mean, ``"constant"`` divides the sum by rows times ``max_new_tokens``.

    Args:
        logprobs: ``(N, T)`` float with gradient.
        old_logprobs: ``(N, T)`` float, before the first update; ``logprobs.detach()`` on-policy.
        ref_logprobs: ``(N, T)`` float, or None for no KL term.
        advantages: ``(N,)`` float.
        mask: ``(N, T)`` bool; all False in invalid rows. Whatever stands in masked-out places has no effect.
        clip_low: lower clipping distance.
        clip_high: upper clipping distance.
        level: ratio per ``"token"``, or exp of the length-normalised log-ratio of the ``"sequence"``.
        kl_coef: coefficient beta.
        kl: the estimator.
        aggregation: the denominator.
        max_new_tokens: needed by ``"constant"``.
        token_count: masked tokens of the whole optimizer step, over all parts and ranks; None: of this call.
        row_count: rows with a non-empty mask of the whole step; None: of this call.

    Returns:
        Loss and statistics. Without a masked token the loss is 0, with a graph.

    Raises:
        ValueError: unlike shapes, unknown names, ``"constant"`` without ``max_new_tokens``, ``kl_coef`` without
            ``ref_logprobs``.

    Example:
        >>> logprobs, advantages = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]]), torch.tensor([1.0, -0.5])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> policy_loss(logprobs, logprobs, None, advantages, mask).loss  # -(1 + 1 - 0.5) / 3
        tensor(-0.5000)
    """
    for name, value, allowed in (("level", level, Level), ("kl", kl, KLEstimator), ("aggregation", aggregation, Aggregation)):
        if value not in get_args(allowed):
            raise ValueError(f"`{name}` must be one of {', '.join(get_args(allowed))}; got {value!r}.")
    if aggregation == "constant" and max_new_tokens is None:
        raise ValueError('`max_new_tokens` must be given with aggregation="constant".')
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"`kl_coef` is {kl_coef} and `ref_logprobs` is None; a KL term needs reference log-probs.")
    mask = mask.bool()
    check_same_shape(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        ref_logprobs=logprobs if ref_logprobs is None else ref_logprobs,
    )
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(f"`advantages` must have shape ({len(logprobs)},), got {tuple(advantages.shape)}.")
    # Junk is replaced before exp, not multiplied away after it: 0 * inf is NaN, in the gradient too.
    logprobs = _keep(logprobs, mask)
    log_ratio = logprobs - _keep(old_logprobs, mask).detach()
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, mask, -1).unsqueeze(-1).expand_as(log_ratio)
    ratio = log_ratio.exp()
    weight = advantages.detach().to(ratio).unsqueeze(-1)
    surrogate = ratio * weight
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * weight
    per_token = -torch.minimum(surrogate, clipped)
    mean_kl = None
    if ref_logprobs is not None:
        d = _keep(ref_logprobs, mask).detach() - logprobs
        penalty = {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: d.exp() - d - 1}[kl]()
        mean_kl = masked_mean(penalty.detach(), mask)
        if kl_coef:
            per_token = per_token + kl_coef * penalty
    rows = int(mask.any(-1).sum()) if row_count is None else row_count
    if aggregation == "token":
        loss = masked_sum(per_token, mask) / max(int(mask.sum()) if token_count is None else token_count, 1)
    elif aggregation == "sequence":
        loss = masked_mean(per_token, mask, -1).sum() / max(rows, 1)
    else:
        loss = masked_sum(per_token, mask) / max(rows * (max_new_tokens or 1), 1)
    with torch.no_grad():
        clip_fraction = masked_mean((surrogate > clipped).to(ratio), mask)
        ratio_max = torch.where(mask, ratio, 0.0).max() if mask.any() else ratio.new_zeros(())
    return LossOutput(loss, mean_kl, clip_fraction, ratio_max)


def _keep(values: Tensor, mask: Tensor) -> Tensor:
    values = at_least_float32(values)
    return torch.where(mask, values, torch.zeros_like(values))
