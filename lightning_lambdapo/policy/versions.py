"""When trained weights have changed, told from the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def trained_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, without gradient. This rank's parts, if they are sharded."""
    return {name: _local(each.detach()) for name, each in policy.named_parameters() if each.requires_grad}


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """One integer for each tensor: the sum of its elements' bits, which any update changes.

    It does not depend on who changed the weights: an optimizer, a callback that swaps in averaged weights, a checkpoint
    or a user.
    """
    sums = [each.reshape(-1).view(_BITS[each.dtype.itemsize]).sum(dtype=torch.int64) for each in tensors.values()]
    return tuple(torch.stack(sums).tolist()) if sums else ()


@contextmanager
def other_weights(policy: nn.Module, weights: Mapping[str, Tensor], *, own: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the policy compute with other trained weights inside this context.

    Args:
        policy: its trained parameters keep their identity.
        weights: a copy of :func:`trained_tensors` made earlier, on any device.
        own: a copy of the current ones, which they get back bit for bit.
    """
    tensors = trained_tensors(policy)
    try:
        _copy(weights, tensors)
        yield
    finally:
        _copy(own, tensors)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
