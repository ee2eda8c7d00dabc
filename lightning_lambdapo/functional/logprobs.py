"""Token log-probabilities without ever holding all logits at once."""

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

    Example:
        >>> logprobs_from_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([-0.6931])
    """
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
    """Log-probabilities of ``targets`` from hidden states, with logits for one chunk of positions at a time.

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
    if len(hidden) != len(targets):
        raise ValueError(f"`hidden` has {len(hidden)} positions and `targets` {len(targets)}; they must agree.")
    if temperature <= 0 or chunk_size < 1:
        raise ValueError(f"`temperature` ({temperature}) and `chunk_size` ({chunk_size}) must be above 0.")

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = at_least_float32(head(hidden)) / temperature
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
        if not entropy:
            return logprobs, logprobs.detach()
        with torch.no_grad():
            weighted = logits.softmax(-1).mul_(logits.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
            return logprobs, normaliser - weighted

    # An empty hidden goes through the head too: the result then still has a graph.
    pieces = [
        checkpoint(score, part, wanted, use_reentrant=False) if torch.is_grad_enabled() else score(part, wanted)
        for part, wanted in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    logprobs = torch.cat([piece[0] for piece in pieces])
    return logprobs, torch.cat([piece[1] for piece in pieces]) if entropy else None
