"""Decoding with adapter and base merged: a third of a step's small operations less, and not one base weight touched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lambdapo.parallel import wrapper


@contextmanager
def merged_adapter(model: nn.Module, wanted: bool | None = None) -> Iterator[None]:
    r"""Run ``model`` with :math:`W + s B A` in place of each adapted :math:`W` for the duration.

    The merged weights are new tensors and the old parameters come back as they were, bit for bit (merging in place and
    subtracting again would not give them back). Only plain LoRA on unsharded float32 or float64 weights is merged:
    rounding to a half type would lose small updates, and 4-bit weights would have to be quantised anew. Other layers
    are left to compute base and adapter one after the other.

    Args:
        model: holds the adapted layers.
        wanted: None merges on the CPU and not elsewhere, where the copy's memory may be scarce.
    """
    merged: list[tuple[LoraLinear, nn.Module, nn.Parameter]] = []
    if wrapper(model) is not model:
        wanted = False  # FSDP1's wrapper keeps watch over the very parameters
    for layer in model.modules():
        if not isinstance(layer, LoraLinear) or not _can_merge(layer):
            continue
        base = layer.get_base_layer()
        weight = cast(nn.Parameter, base.weight)
        if not (weight.device.type == "cpu" if wanted is None else wanted):
            continue
        merged.append((layer, base, weight))
    try:
        for layer, base, weight in merged:
            base.weight = nn.Parameter(_merged_weight(layer, weight.detach()), requires_grad=False)
            layer.merged_adapters.extend(layer.active_adapters)
        yield
    finally:
        for layer, base, weight in merged:
            base.weight = weight
            layer.merged_adapters.clear()


def _can_merge(layer: LoraLinear) -> bool:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    weight = getattr(layer.get_base_layer(), "weight", None)
    return (
        bool(active)
        and len(active) == len(layer.active_adapters)
        and not layer.disable_adapters
        and not layer.merged
        and not any(name in layer.lora_variant or layer.lora_bias[name] for name in active)
        and isinstance(weight, nn.Parameter)
        and not isinstance(weight, DTensor)
        and weight.dtype in (torch.float32, torch.float64)
    )


@torch.no_grad()
def _merged_weight(layer: LoraLinear, weight: Tensor) -> Tensor:
    """The merged weight, stored by input feature: products with few rows are a quarter faster that way round."""
    for name in layer.active_adapters:
        if layer.fan_in_fan_out:
            weight = weight + layer.get_delta_weight(name)
        else:
            up, down = cast(Tensor, layer.lora_B[name].weight), cast(Tensor, layer.lora_A[name].weight)
            weight = torch.addmm(weight.t(), down.t(), up.t(), alpha=layer.scaling[name]).t()
    return weight
