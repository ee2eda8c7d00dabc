"""Completion masks, reductions over the positions that count, and the checks the other functions share."""

from collections.abc import Sequence

import torch
from torch import Tensor


def completion_mask(completion_ids: Tensor, eos_ids: int | Sequence[int]) -> Tensor:
    """Mark each row from its first token through its first end-of-sequence token.

    The padding token may be one of ``eos_ids``, because nothing after the first of them counts.

    Args:
        completion_ids: ``(N, T)`` int64.
        eos_ids: one id, or several, that end a completion.

    Returns:
        ``(N, T)`` bool.

    Raises:
        ValueError: ``completion_ids`` is not two-dimensional, or there is no end-of-sequence id.

    Example:
        >>> completion_mask(torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8]]), eos_ids=2)
        tensor([[ True,  True, False, False],
                [ True,  True,  True,  True]])
    """
    ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids)
    if not ids:
        raise ValueError("`eos_ids` is empty. Give at least one end-of-sequence id.")
    if completion_ids.ndim != 2:
        raise ValueError(f"`completion_ids` must have shape (N, T), got {tuple(completion_ids.shape)}.")
    ends = torch.isin(completion_ids, torch.tensor(ids, device=completion_ids.device))
    ends_before = ends.long().cumsum(-1) - ends.long()
    return ends_before == 0


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    r"""Sum over the positions that count: :math:`\sum_t m_t x_t`.

    Junk elsewhere, NaN included, affects neither value nor gradient, because it is replaced, not multiplied by 0.

    Args:
        values: float, of any shape. Half types are raised to float32.
        mask: bool, of the same shape.
        dim: dimension to sum over. None sums everything.

    Returns:
        float32, or float64 for float64 values, without dimension ``dim``. 0 where nothing counts.

    Example:
        >>> masked_sum(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(4.)
    """
    values = at_least_float32(values)
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    r"""Mean over the positions that count: :math:`\sum_t m_t x_t / \sum_t m_t`.

    Args:
        values: float, of any shape. Half types are raised to float32.
        mask: bool, of the same shape.
        dim: dimension to average over. None averages everything.

    Returns:
        float32, or float64 for float64 values, without dimension ``dim``. 0 where nothing counts.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of the ``allowed`` names."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


def at_least_float32(values: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return values if values.dtype == torch.float64 else values.float()


def kept_values(values: Tensor, mask: Tensor) -> Tensor:
    """Values where they count, in float32 at least, and 0 elsewhere."""
    values = at_least_float32(values)
    return torch.where(mask, values, torch.zeros_like(values))


def outside_autocast(values: Tensor) -> torch.autocast:
    """Context for products that must keep the type of their factors, on the device of ``values``."""
    return torch.autocast(values.device.type, enabled=False)


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ``ValueError`` with all shapes unless the named tensors have the same shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"`{name}` {shape}" for name, shape in shapes.items())
        raise ValueError(f"Shapes must agree, got {listed}.")
