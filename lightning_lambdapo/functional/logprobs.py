"""Token log-probabilities, with the logits of only one chunk in memory at a time."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lightning_lambdapo.functional.masking import at_least_float32, outside_autocast

#: Logits of which a finite copy exists at a time.
_CLAMPED = 1 << 20


def logprobs_from_logits(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Log-probability of each target: :math:`\log softmax(logits / temperature)[target]`.

    Args:
        logits: ``(..., V)`` float. Half types are raised to float32.
        targets: ``(...)`` int64.
        temperature: above 0.

    Returns:
        ``(...)`` float32, or float64 for float64 logits.

    Raises:
        ValueError: different shapes, or a temperature that is not a finite number above 0.

    Example:
        >>> logprobs_from_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([-0.6931])
    """
    temperature = _checked_temperature(temperature)
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"`logits` must have shape (*targets.shape, V), got {(*logits.shape,)} and {(*targets.shape,)}."
        )
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
    recompute: bool = True,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probabilities of ``targets`` from hidden states, with logits for one chunk of positions at a time.

    .. math:: \log softmax(head(h) / temperature)[target]

    Memory grows with ``chunk_size`` times the vocabulary, not with ``M`` times the vocabulary. Each chunk's logits are
    recomputed in the backward pass. With ``recompute=False``, the gradient of each log-probability with respect to its
    own hidden state,

    .. math:: \frac{\partial \log p_m}{\partial h_m} = J_{head}(h_m)^\top (e_{target} - p_m) / temperature,

    is computed in the forward pass, while the logits exist. The backward pass only multiplies it by the incoming
    gradient. This saves one product with the vocabulary. Use it for a head without trainable parameters.

    Args:
        hidden: ``(M, H)`` float, of the positions that predict ``targets``.
        targets: ``(M,)`` int64.
        head: ``(m, H) -> (m, V)`` logits, including the model's scaling or soft cap of them.
        temperature: divisor of the logits, above 0.
        chunk_size: positions per chunk.
        entropy: also return the entropy of each position's distribution, without gradient.
        recompute: False computes the gradient in the forward pass. Then only ``hidden`` gets a gradient.

    Returns:
        Log-probabilities ``(M,)``, float32 or float64. Entropies ``(M,)`` in nats, or None.

    Raises:
        ValueError: different lengths, or a temperature or chunk size that is not above 0.

    Example:
        >>> hidden = torch.eye(2)
        >>> chunked_logprobs(hidden, torch.tensor([0, 0]), lambda h: h, chunk_size=1)[0]
        tensor([-0.3133, -1.3133])
    """
    temperature = _checked_temperature(temperature)
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"`hidden` must have shape (M, H) and `targets` (M,), got {tuple(hidden.shape)} and {tuple(targets.shape)}."
        )

    def compute(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = at_least_float32(head(hidden)) / temperature
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
        if not entropy:
            return (logprobs,)
        detached = logits.detach()
        return logprobs, entropy_from_softmax(detached, detached.softmax(-1), normaliser.detach())

    def compute_ahead(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return cast(tuple[Tensor, ...], cast(Any, _GradientAhead).apply(hidden, targets, head, temperature, entropy))

    scorer = compute
    if torch.is_grad_enabled() and recompute:
        scorer = partial(checkpoint, compute, use_reentrant=False)
    elif torch.is_grad_enabled() and hidden.requires_grad:
        scorer = compute_ahead
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    # An empty `hidden` is one empty chunk, so that even its result has a graph.
    for part, wanted in zip(torch.split(hidden, chunk_size), torch.split(targets, chunk_size), strict=True):
        computed = scorer(part, wanted)
        logprobs.append(computed[0])
        entropies.extend(computed[1:])
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


class _GradientAhead(torch.autograd.Function):
    """Log-probabilities of one chunk, with their gradient computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Callable[[Tensor], Tensor],
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = hidden.detach().requires_grad_()
            logits = head(inputs)
        scaled = at_least_float32(logits.detach())
        scaled = scaled if temperature == 1 else scaled / temperature
        probabilities, normaliser = softmax_and_normaliser(scaled)
        chosen = targets.unsqueeze(-1)
        logprobs = scaled.gather(-1, chosen).squeeze(-1) - normaliser
        extra = (entropy_from_softmax(scaled, probabilities, normaliser),) if entropy else ()
        gradient = probabilities.neg_()
        gradient.scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=gradient.dtype))
        (ahead,) = torch.autograd.grad(logits, inputs, gradient.to(logits.dtype))
        ctx.save_for_backward(ahead if temperature == 1 else ahead.div_(temperature))
        ctx.mark_non_differentiable(*extra)
        return (logprobs, *extra)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (ahead,) = ctx.saved_tensors
        return ahead * gradient.unsqueeze(-1).to(ahead.dtype), None, None, None, None


def softmax_and_normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    r"""Probabilities ``(..., V)`` and :math:`\log \sum_v e^{z_v}` ``(...)`` of logits ``z``, in one pass over them.

    The most likely token has :math:`p_{max} = e^{z_{max} - \log \sum e^z} \ge 1 / V`, so that
    :math:`z_{max} - \log p_{max}` is the normaliser without loss of precision.

    Example:
        >>> softmax_and_normaliser(torch.zeros(4))[1]
        tensor(1.3863)
    """
    probabilities = logits.softmax(-1)
    if not logits.numel():
        return probabilities, logits.new_zeros(logits.shape[:-1])
    return probabilities, logits.amax(-1) - probabilities.amax(-1).log()


def entropy_from_softmax(logits: Tensor, probabilities: Tensor, normaliser: Tensor) -> Tensor:
    r"""Entropy in nats, :math:`\log \sum_v e^{z_v} - \sum_v p_v z_v`. Logits of -inf contribute 0."""
    with outside_autocast(logits):  # it would round both factors to 16 bits
        # 0 * -inf is not a number. A look whether there is any would make the host wait for the device.
        vocabulary, least = logits.shape[-1], torch.finfo(logits.dtype).min
        rows = max(1, _CLAMPED // max(1, vocabulary))
        parts = (values.reshape(-1, vocabulary).split(rows) for values in (probabilities, logits))
        means = [torch.linalg.vecdot(p, z.clamp(min=least)) for p, z in zip(*parts, strict=True)]
    return normaliser - torch.cat(means).view(normaliser.shape)


def _checked_temperature(temperature: float) -> float:
    if not 0 < temperature <= sys.float_info.max:
        raise ValueError(f"`temperature` must be a finite number above 0, got {temperature}. It divides the logits.")
    return float(temperature)  # torch cannot divide by an integer of more than 64 bits
