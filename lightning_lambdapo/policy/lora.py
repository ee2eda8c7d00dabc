"""LoRA layers: base and adapter are one operation while learning, and merged while decoding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from lightning_lambdapo.distributed.fsdp1 import wrapper
from lightning_lambdapo.policy.kernels import (
    OneDNNLinear,
    has_avx512,
    has_onednn,
    is_float32_on_cpu,
    is_plain,
    onednn_linear,
)


def fast_linears(model: nn.Module, *, fused_lora: bool = True, onednn: bool | None = None) -> None:
    r"""Let the linear layers of ``model`` compute with less work. Parameters, names and results do not change.

    ``fused_lora`` computes :math:`x W^\top + b + s (x A^\top) B^\top` of a plain LoRA layer as one operation. The
    adapter's product is accumulated into the base's in both directions, while peft's own forward scales and adds whole
    activations four times. peft's own forward still computes adapter dropout, DoRA and other variants, several active
    adapters, quantised or trained bases, layers with hooks on their parts, and autocast. ``onednn`` computes float32
    products on the CPU with oneDNN instead of MKL. MKL does not use AVX-512 on AMD processors, and is slow for the few
    rows of a decoding step.

    Args:
        model: changed in place. Copies and saved files have the same parameters and names.
        fused_lora: as above.
        onednn: as above. None does so on processors with AVX-512.
    """
    onednn = has_onednn() and (has_avx512() if onednn is None else onednn)
    for module in model.modules():
        if onednn and type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif fused_lora and type(module) is LoraLinear:
            module.__class__ = FusedLoraLinear


class FusedLoraLinear(LoraLinear):
    """peft's LoRA layer with base and adapter as one operation, if the layer is plain LoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted layer's output."""
        if args or kwargs or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        if self.merged_adapters:
            return cast(Tensor, base(x))
        name = self.active_adapters[0]
        if (
            len(self.active_adapters) > 1
            or name not in self.lora_A
            or name in self.lora_variant
            or self.lora_bias[name]
            or not isinstance(base, nn.Linear)
            or type(base).forward not in (nn.Linear.forward, OneDNNLinear.forward)
            or any(parameter.requires_grad for parameter in base.parameters())
            or any(
                part._forward_hooks or part._forward_pre_hooks for part in (base, self.lora_A[name], self.lora_B[name])
            )
            or (self.training and not isinstance(self.lora_dropout[name], nn.Identity))
        ):
            return super().forward(x)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if not (is_plain(x) and base.weight.dtype == down.dtype == up.dtype == x.dtype):
            return super().forward(x)
        onednn = isinstance(base, OneDNNLinear) and is_float32_on_cpu(x, base.weight)
        apply = cast(Any, _AdaptedLinear).apply
        return cast(Tensor, apply(x, base.weight, base.bias, down, up, self.scaling[name], onednn))


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer with a LoRA adapter. Both directions accumulate the adapter's part into the base's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float, onednn: bool
    ) -> Tensor:
        product = onednn_linear if onednn else nn.functional.linear
        flat = x.flatten(0, -2)
        inner = product(flat, down, None)
        out = product(flat, weight, bias).addmm_(inner, up.t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, down, up, inner)
        ctx.scaling, ctx.product, ctx.shape = scaling, product, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        inner_gradient = ctx.product(flat, up.t(), None).mul_(ctx.scaling)
        # (r, M) times (M, features) is the fast order of a product with few rows.
        down_gradient = ctx.product(inner_gradient.t(), x.t(), None) if ctx.needs_input_grad[3] else None
        up_gradient = ctx.product(inner.t(), flat.t(), None).mul_(ctx.scaling).t() if ctx.needs_input_grad[4] else None
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = ctx.product(flat, weight.t(), None).addmm_(inner_gradient, down).view(ctx.shape)
        return x_gradient, None, None, down_gradient, up_gradient, None, None


@contextmanager
def merged_adapter(model: nn.Module, wanted: bool | None = None) -> Iterator[None]:
    r"""Run ``model`` with :math:`W + s B A` in place of each adapted :math:`W` inside this context.

    The merged weights are new tensors, and the old parameters are restored bit for bit. Merging in place and
    subtracting again would not restore them. Only plain LoRA on unsharded float32 or float64 weights is merged, because
    rounding to a half type would lose small updates, and 4-bit weights would have to be quantised again. Other layers
    compute base and adapter one after the other.

    Args:
        model: has the adapted layers.
        wanted: True merges, False does not. None merges only on the CPU, because the copy needs memory.
    """
    merged: list[tuple[LoraLinear, nn.Module, nn.Parameter]] = []
    if wrapper(model) is not model:
        wanted = False  # FSDP1's wrapper tracks these very parameters
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
    """The merged weight, stored by input feature, because products with few rows are then a quarter faster."""
    for name in layer.active_adapters:
        if layer.fan_in_fan_out:
            weight = weight + layer.get_delta_weight(name)
        else:
            up, down = cast(Tensor, layer.lora_B[name].weight), cast(Tensor, layer.lora_A[name].weight)
            weight = torch.addmm(weight.t(), down.t(), up.t(), alpha=layer.scaling[name]).t()
    return weight
