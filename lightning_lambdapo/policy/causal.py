"""Scaled dot-product attention to earlier positions, by the kernel that the device has for it."""

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right

#: Lengths are rounded up to a multiple of this on CUDA, so that few shapes occur and plans of kernels are reused.
CUDA_BUCKET = 64


def bucket(device: torch.device) -> int:
    """The multiple that lengths are rounded up to on this device."""
    return CUDA_BUCKET if device.type == "cuda" else 1


def needs_mask(device: torch.device, length: int, keys: int) -> bool:
    """True if the last ``length`` of ``keys`` positions need a mask to attend to those up to themselves.

    All positions of a row never do. The last ones do not on CUDA: flash and memory-efficient kernels align their
    triangle with the lower right corner. Elsewhere ``causal_lower_right`` would make a new mask in each layer.
    """
    return length != keys and not (device.type == "cuda" and torch.version.hip is None)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of the last ``l`` of ``m`` positions.

    Args:
        query: ``(b, H, l, d)``.
        key: ``(b, K, m, d)``. ``H`` is a multiple of ``K``.
        value: ``(b, K, m, e)``.
        mask: additive ``(l, m)``. None lets each position attend to all up to itself.
        scaling: factor of the scores.

    Returns:
        ``(b, H, l, e)``, in autocast's dtype inside autocast.
    """
    if torch.is_autocast_enabled(query.device.type):
        # Autocast does not reach the kernels behind causal_lower_right. They want one dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (
            states if states.dtype == torch.float64 else states.to(dtype) for states in (query, key, value)
        )
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and not takes_grouped_heads(query, key, value, mask):
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        repeats = 1
    square = query.shape[2] == key.shape[2]
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(query.shape[2], key.shape[2]) if mask is None and not square else mask,
        is_causal=mask is None and square,
        scale=scaling,
        enable_gqa=repeats > 1,
    )


def takes_grouped_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """True if the kernel reads each key head for all its query heads.

    On CUDA only flash does so. Without repeated heads, the others would compute all scores in memory.
    """
    if query.device.type != "cuda":
        return True
    return mask is None and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True))
