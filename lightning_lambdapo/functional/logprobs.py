"""Token log-probabilities without ever holding all logits at once."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_lambdapo.functional.masking import at_least_float32


def logprobs_from_logits(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Log-probability of each target: :math:`\log softmax(logits / temperature)[target]`.

    Args:
        logits: ``(..., V)`` float; half types are raised to float32.
        targets: ``(...)`` int64.
        temperature: above 0.

    Returns:
        ``(...)`` float32, or float64 for such logits.

    Raises:
        ValueError: unlike shapes, or a temperature that is not a finite number above 0.

    Example:
        >>> logprobs_from_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([-0.6931])
    """
    _check_temperature(temperature)
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"`logits` must be `targets`' shape and (V,), got {(*logits.shape,)} and {(*targets.shape,)}.")
    scaled = at_least_float32(logits) / temperature
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probabilities of ``targets`` from hidden states, with logits for one chunk of positions at a time.

    .. math:: \log softmax(head(h) / temperature)[target]

    Under gradient each chunk's logits are recomputed in the backward pass, so memory grows with ``chunk_size`` times
    the vocabulary and not with ``M`` times the vocabulary.

    Args:
        hidden: ``(M, H)`` float, of the positions that predict ``targets``.
        targets: ``(M,)`` int64.
        head: ``(m, H) -> (m, V)`` logits, with whatever the model does to them (scaling, soft cap).
        temperature: divisor of the logits; above 0.
        chunk_size: positions per chunk.
        entropy: also return the entropy of each position's distribution, without gradient.

    Returns:
        Log-probabilities ``(M,)``, float32 or float64; entropies ``(M,)`` in nats, or None.

    Raises:
        ValueError: unlike lengths, or a temperature or chunk size that is not above 0.

    Example:
        >>> hidden = torch.eye(2)
        >>> chunked_logprobs(hidden, torch.tensor([0, 0]), lambda h: h, chunk_size=1)[0]
        tensor([-0.3133, -1.3133])
    """
    _check_temperature(temperature)
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"`hidden` must have shape (M, H) and `targets` (M,), got {tuple(hidden.shape)} and {tuple(targets.shape)}."
        )

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = at_least_float32(head(hidden)) / temperature
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
        if not entropy:
            return (logprobs,)
        with torch.no_grad():  # -inf logits have probability 0, and 0 * -inf would be NaN
            expected = logits.softmax(-1).mul_(logits.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
            return logprobs, normaliser - expected

    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    # An empty `hidden` is one empty chunk, so that the result has a graph all the same.
    for part, wanted in zip(torch.split(hidden, chunk_size), torch.split(targets, chunk_size), strict=True):
        scored = (
            checkpoint(score, part, wanted, use_reentrant=False) if torch.is_grad_enabled() else score(part, wanted)
        )
        logprobs.append(scored[0])
        entropies.extend(scored[1:])
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"`temperature` must be a finite number above 0, got {temperature}; sampling's divides logits."
        )
