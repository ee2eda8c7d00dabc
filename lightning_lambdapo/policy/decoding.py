"""The weights that a rollout decodes with: made once in the type of the computation, and freed before learning."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lambdapo.config import PerformanceConfig
from lightning_lambdapo.distributed.fsdp1 import wrapper

_QUANTIZED = ("Linear4bit", "Linear8bitLt")
_warned: WeakSet[nn.Module] = WeakSet()


@contextmanager
def decoding_weights(model: nn.Module, performance: PerformanceConfig = PerformanceConfig()) -> Iterator[None]:
    r"""Run ``model`` with weights that suit decoding inside this context, where it computes the same up to rounding.

    A decoding step is short, so that casting or dequantising weights again in each step would dominate it. The type of
    the computation is that of autocast if it is on, else that of the weights (of ``bnb_4bit_compute_dtype``).

    - A plain LoRA layer is merged if ``merge_adapter`` says so: :math:`W + s B A` is computed in float32 (float64 for
      float64 weights), also under autocast, and rounded once.
    - Otherwise its A and B are copied in the type of the computation.
    - Quantised weights are dequantised, and weights of another type than that of the computation are cast, as long as
      the copies fit in ``decoding_weights_gb``.

    All of these are new tensors. The old parameters are restored bit for bit. Weights that are sharded or tracked by
    FSDP1's wrapper stay as they are. If merging was asked for and no layer can be merged, one warning says why.

    Args:
        model: the causal language model, or a model around it.
        performance: the settings ``merge_adapter`` and ``decoding_weights_gb``.
    """
    with ExitStack() as restored:
        reasons = {"the strategy's wrapper tracks the parameters": None}
        if wrapper(model) is model:
            kind = next(model.parameters()).device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                reasons = _prepare(model, performance, restored, autocast)
        elif not performance.merge_adapter:
            reasons = {}
        if reasons and model not in _warned:
            _warned.add(model)
            warnings.warn(
                f"`performance.merge_adapter` is true, but no layer of {type(model).__name__} can be merged: "
                f"{', '.join(reasons)}. The adapter is computed beside its base. Set it to null to choose that without "
                "this message.",
                stacklevel=3,
            )
        yield


def _prepare(
    model: nn.Module, performance: PerformanceConfig, restored: ExitStack, autocast: torch.dtype | None
) -> dict[str, None]:
    """Replace weights. Returns why nothing was merged although it was asked for: empty if there is no reason."""
    layers: dict[nn.Module, Any] = {_base(layer): layer for layer in model.modules() if _is_lora(layer)}
    own = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    budget = _Budget(performance.decoding_weights_gb, next(model.parameters()).device)
    reasons: dict[str, None] = {} if layers else {"it has no LoRA layer": None}
    merged = 0
    for path, module in list(model.named_modules()):
        layer: Any = layers.get(module)
        if layer is None and not isinstance(module, nn.Linear):
            continue
        weight = module.weight
        if isinstance(weight, DTensor) or not isinstance(weight, nn.Parameter):
            reasons["weights are sharded or computed"] = None
            continue
        dtype = _computed_in(module, own if is_quantized(module) else weight.dtype, autocast)
        plain = layer is not None and _is_plain(layer)
        exact = weight.device.type == "cpu" and dtype in (torch.float32, torch.float64)
        merge = plain and (exact if performance.merge_adapter is None else performance.merge_adapter)
        if layer is not None and not plain and not layer.disable_adapters:
            reasons["the adapter is not plain LoRA"] = None
        new = _copied(module, layer if merge else None, dtype, budget)
        if isinstance(new, nn.Module):
            _set(restored, model.get_submodule(path.rpartition(".")[0]), path, new)
        elif new is not None:
            _set(restored, module, "weight", new)
        if merge and new is not None:
            merged += 1
            layer.merged_adapters.extend(layer.active_adapters)
            restored.callback(layer.merged_adapters.clear)
        elif plain:
            reasons["the base is quantised, see `performance.decoding_weights_gb`"] = None
            _copy_adapter(layer, dtype, restored)
    return reasons if performance.merge_adapter and not merged else {}


def _copied(module: nn.Module, merging: Any, dtype: torch.dtype, budget: "_Budget") -> nn.Module | nn.Parameter | None:
    """What replaces a quantised layer, or the weight of another, with the adapter of ``merging``. None: nothing."""
    if is_quantized(module):
        size = cast(nn.Linear, module).out_features * cast(nn.Linear, module).in_features
        if not can_dequantize(module) or not budget.take(size * dtype.itemsize):
            return None
        full = dequantized(module)
        return _Dequantized(module, (full if merging is None else _merged_weight(merging, full)).to(dtype))
    weight = cast(nn.Parameter, module.weight).detach()
    if merging is not None:
        return _frozen(_merged_weight(merging, weight).to(dtype))
    if weight.dtype != dtype and budget.take(weight.numel() * dtype.itemsize):
        return _frozen(weight.to(dtype))
    return None


def _copy_adapter(layer: Any, dtype: torch.dtype, restored: ExitStack) -> None:
    for name in layer.active_adapters:
        for part in (layer.lora_A[name], layer.lora_B[name]):
            if part.weight.dtype != dtype:
                _set(restored, part, "weight", _frozen(part.weight.detach().to(dtype)))


class _Dequantized(nn.Module):
    """A quantised layer's product with its weight in full. Types of input and output are those of the layer."""

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.weight = _frozen(weight)
        self.bias = cast("nn.Parameter | None", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


class _Budget:
    """Bytes that copies may take."""

    def __init__(self, gigabytes: float | None, device: torch.device) -> None:
        if gigabytes is not None:
            self.left = gigabytes * 1e9
        elif device.type == "cuda":  # the other half is for keys and values
            reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            self.left = (torch.cuda.mem_get_info(device)[0] + reserved) / 2
        else:
            self.left = 0.0

    def take(self, size: int) -> bool:
        """Take ``size`` bytes if they are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


def is_quantized(module: nn.Module) -> bool:
    """True for a linear layer of bitsandbytes in 4 or 8 bits."""
    return type(module).__name__ in _QUANTIZED


def _base(layer: Any) -> nn.Module:
    return cast(nn.Module, layer.get_base_layer())


def _is_lora(layer: nn.Module) -> bool:
    return isinstance(layer, LoraLinear) or (isinstance(layer, LoraLayer) and is_quantized(_base(layer)))


def _is_plain(layer: Any) -> bool:
    """Whether the layer computes ``W x + s B A x`` with all of its active adapters."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return (
        bool(active)
        and len(active) == len(layer.active_adapters)
        and not layer.disable_adapters
        and not layer.merged
        and not any(name in layer.lora_variant or layer.lora_bias[name] for name in active)
    )


def _computed_in(module: nn.Module, own: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """The type in which the layer computes its product."""
    if autocast is not None and own != torch.float64:  # which autocast leaves alone
        return autocast
    chosen = getattr(module, "compute_dtype", None)
    return chosen if isinstance(chosen, torch.dtype) else own


def can_dequantize(module: nn.Module) -> bool:
    """True if :func:`dequantized` knows the format of a quantised layer."""
    if type(module).__name__ == "Linear8bitLt":
        return _scales(module) is not None and cast(Tensor, module.weight).dtype == torch.int8
    state = getattr(module.weight, "quant_state", None)
    return state is not None and not getattr(state, "packing_format_for_cpu", False)


def dequantized(module: nn.Module) -> Tensor:
    """The layer's weight ``(out, in)`` in full, in the type that it was quantised from or float32."""
    weight = cast(Any, module.weight)
    if type(module).__name__ == "Linear8bitLt":
        scales = cast(Tensor, _scales(module)).float().view(-1, 1)
        return cast(Tensor, weight.data.float() * (scales / 127))
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _scales(module: nn.Module) -> Tensor | None:
    """The largest absolute value of each row of an 8-bit weight. It moves to the state in the first forward."""
    found: Tensor | None = getattr(module.state, "SCB", None)
    return getattr(module.weight, "SCB", None) if found is None else found


def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """The merged weight in float32, or float64 for a float64 weight.

    It is stored by input feature, because products with few rows are then a quarter faster on a CPU.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for name in layer.active_adapters:
        up, down = (part[name].weight.to(weight.dtype) for part in (layer.lora_B, layer.lora_A))
        if layer.fan_in_fan_out:
            weight = torch.addmm(weight, down.t(), up.t(), alpha=layer.scaling[name])
        else:
            weight = torch.addmm(weight.t(), down.t(), up.t(), alpha=layer.scaling[name]).t()
    return weight


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _set(restored: ExitStack, owner: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    """Set the attribute that the path ends with. Its present value is restored at the end."""
    name = path.rpartition(".")[2]
    restored.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
