"""LoRA layers whose base and adapter are one operation."""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_lambdapo.policy.kernels import (
    OneDNNLinear,
    has_avx512,
    has_onednn,
    is_float32_on_cpu,
    onednn_linear,
)

_HALVES = (torch.bfloat16, torch.float16)


def fast_linears(model: nn.Module, *, fused_lora: bool = True, onednn: bool | None = None) -> None:
    r"""Let the linear layers of ``model`` compute with less work. Parameters, names and results do not change.

    ``fused_lora`` computes :math:`x W^\top + b + s (x A^\top) B^\top` of a plain LoRA layer as one operation. The
    adapter's product is accumulated into the base's in both directions, while peft's own forward scales and adds whole
    activations four times. Under autocast, and where a float32 adapter is over 16-bit activations, both products are
    in the 16-bit type, and gradients of the adapter are float32. peft's own forward still computes adapter dropout,
    DoRA and other variants, several active adapters, quantised or trained bases, and layers with hooks on their parts.
    ``onednn`` computes float32
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
        down, up = (cast(Tensor, part[name].weight) for part in (self.lora_A, self.lora_B))
        dtype = _product_dtype(x, base.weight, down, up)
        if dtype is None:
            return super().forward(x)
        onednn = isinstance(base, OneDNNLinear) and is_float32_on_cpu(x, base.weight)
        apply = cast(Any, _AdaptedLinear).apply
        return cast(Tensor, apply(x.to(dtype), base.weight, base.bias, down, up, self.scaling[name], onednn))


def _product_dtype(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> torch.dtype | None:
    """The type of the products: that of autocast, or of the activations. None leaves the layer to peft."""
    types = {weight.dtype, down.dtype, up.dtype}
    if not x.numel():
        return None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return dtype if dtype in _HALVES and types | {x.dtype} <= {torch.float32, *_HALVES} else None
    if weight.dtype != x.dtype or down.dtype != up.dtype:
        return None
    return x.dtype if types == {x.dtype} or (x.dtype in _HALVES and down.dtype == torch.float32) else None


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer with a LoRA adapter. Both directions accumulate the adapter's part into the base's.

    Products are in the type of ``x``. Parameters of another type are cast again in the backward pass, so that no cast
    copy is kept. Gradients of the adapter have its type.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float, onednn: bool
    ) -> Tensor:
        product = onednn_linear if onednn else nn.functional.linear
        flat = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            inner = product(flat, down.to(x.dtype), None)
            out = product(flat, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            out.addmm_(inner, up.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, down, up, inner)
        ctx.scaling, ctx.product, ctx.shape = scaling, product, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        down_gradient = up_gradient = x_gradient = None
        with torch.autocast(x.device.type, enabled=False):
            inner_gradient = ctx.product(flat, up.to(x.dtype).t(), None).mul_(ctx.scaling)
            # (r, M) times (M, features) is the fast order of a product with few rows.
            if ctx.needs_input_grad[3]:
                down_gradient = ctx.product(inner_gradient.t(), x.t(), None).to(down.dtype)
            if ctx.needs_input_grad[4]:
                up_gradient = ctx.product(inner.t(), flat.t(), None).to(up.dtype).mul_(ctx.scaling).t()
            if ctx.needs_input_grad[0]:
                x_gradient = ctx.product(flat, weight.to(x.dtype).t(), None)
                x_gradient = x_gradient.addmm_(inner_gradient, down.to(x.dtype)).view(ctx.shape)
        return x_gradient, None, None, down_gradient, up_gradient, None, None
