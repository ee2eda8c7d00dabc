"""Linear layers on the CPU with oneDNN."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` computed with oneDNN, if the tensors are float32 on the CPU."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return ``input @ weight.T + bias``."""
        if not is_float32_on_cpu(input, self.weight):
            return super().forward(input)
        if torch.is_grad_enabled():
            return cast(Tensor, cast(Any, _Linear).apply(input, self.weight, self.bias))
        return onednn_linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            onednn_linear(gradient, weight.t(), None) if wants_x else None,
            onednn_linear(flat.t(), x.flatten(0, -2).t(), None) if wants_weight else None,
            flat.sum(0) if wants_bias else None,
        )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, by the operator that torch's compiler emits for linear layers on the CPU."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def is_float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is used: float32 on the CPU, outside of autocast."""
    return x.dtype == torch.float32 == weight.dtype and x.device.type == "cpu" and is_plain(x)


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` has elements and autocast is off."""
    return x.numel() > 0 and not torch.is_autocast_enabled(x.device.type)


def has_onednn() -> bool:
    """Whether torch was built with oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_avx512() -> bool:
    """Whether the processor has AVX-512."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
