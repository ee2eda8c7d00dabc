"""Linear layers that do the same sums with less work: base and LoRA adapter as one operation, oneDNN on the CPU."""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fast_linears(model: nn.Module, *, fused_lora: bool = True, onednn: bool | None = None) -> None:
    r"""Let the linear layers of ``model`` compute with less work; parameters, names and results stay as they are.

    ``fused_lora`` computes :math:`x W^\top + b + s (x A^\top) B^\top` of a plain LoRA layer as one operation: the
    adapter's product is accumulated into the base's in both directions, where peft's own forward scales and adds whole
    activations four times. Adapter dropout, DoRA and the other variants, several active adapters, quantised or trained
    bases, layers with hooks on their parts and autocast take peft's own way. ``onednn`` computes float32 products on
    the CPU by oneDNN, where torch asks MKL: that leaves AVX-512 unused on AMD processors, and is slow for the few rows
    of a decoding step.

    Args:
        model: is changed in place; what is deep-copied or saved later is not aware of it.
        fused_lora: as above.
        onednn: as above; None does so on processors with AVX-512.
    """
    onednn = _has_onednn() and (_has_avx512() if onednn is None else onednn)
    for module in model.modules():
        if onednn and type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif fused_lora and type(module) is LoraLinear:
            module.__class__ = FusedLoraLinear


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` by oneDNN, where the tensors are float32 on the CPU."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return ``input @ weight.T + bias``."""
        if not _is_float32_on_cpu(input, self.weight):
            return super().forward(input)
        if torch.is_grad_enabled():
            return cast(Tensor, cast(Any, _Linear).apply(input, self.weight, self.bias))
        return _onednn(input, self.weight, self.bias)


class FusedLoraLinear(LoraLinear):
    """peft's LoRA layer with base and adapter as one operation, where that is all there is to it."""

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
        if not (_is_plain(x) and base.weight.dtype == down.dtype == up.dtype == x.dtype):
            return super().forward(x)
        onednn = isinstance(base, OneDNNLinear) and _is_float32_on_cpu(x, base.weight)
        apply = cast(Any, _AdaptedLinear).apply
        return cast(Tensor, apply(x, base.weight, base.bias, down, up, self.scaling[name], onednn))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            _onednn(gradient, weight.t(), None) if wants_x else None,
            _onednn(flat.t(), x.flatten(0, -2).t(), None) if wants_weight else None,
            flat.sum(0) if wants_bias else None,
        )


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer with a LoRA adapter; both directions accumulate the adapter's part into the base's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float, onednn: bool
    ) -> Tensor:
        product = _onednn if onednn else nn.functional.linear
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
        # (r, M) times (M, features): the order of a product with few rows that is fast.
        down_gradient = ctx.product(inner_gradient.t(), x.t(), None) if ctx.needs_input_grad[3] else None
        up_gradient = ctx.product(inner.t(), flat.t(), None).mul_(ctx.scaling).t() if ctx.needs_input_grad[4] else None
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = ctx.product(flat, weight.t(), None).addmm_(inner_gradient, down).view(ctx.shape)
        return x_gradient, None, None, down_gradient, up_gradient, None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``; the operator is what torch's own compiler emits for linear layers on the CPU."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def _is_float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 == weight.dtype and x.device.type == "cpu" and _is_plain(x)


def _is_plain(x: Tensor) -> bool:
    return x.numel() > 0 and not torch.is_autocast_enabled(x.device.type)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
