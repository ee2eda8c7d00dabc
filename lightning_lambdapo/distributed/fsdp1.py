"""Everything that only ``FSDPStrategy`` needs. Readers of the rest can skip this file.

Lightning's ``strategy: fsdp`` means FSDP1: it flattens parameters and puts a wrapper around the model.
``ModelParallelStrategy`` (FSDP2) needs none of this.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

_WRAPPER = "lambdapo_wrapper"


def flattens(strategy: Strategy) -> bool:
    """True under ``FSDPStrategy``: a parameter is this rank's part of a flat tensor, and has no shape of its own."""
    return isinstance(strategy, FSDPStrategy)


def wrap(model: nn.Module, strategy: FSDPStrategy, layers: Sequence[nn.Module]) -> nn.Module:
    """Wrap the model with the strategy's own settings.

    Lightning would make the whole training step one forward pass of its wrapper. Such a pass cannot contain a rollout
    and several backward passes.
    """
    wrapped = FullyShardedDataParallel(
        model,
        cpu_offload=strategy.cpu_offload,
        mixed_precision=strategy.mixed_precision_config,
        sharding_strategy=strategy.sharding_strategy,
        device_id=strategy.root_device,
        **{"auto_wrap_policy": ModuleWrapPolicy({type(layer) for layer in layers})} | strategy.kwargs,
    )
    model.__dict__[_WRAPPER] = wrapped  # not a submodule of what it wraps
    return wrapped


def wrapper(model: nn.Module) -> nn.Module:
    """What to call in place of ``model``, so that its weights are gathered. The model itself if nothing wraps it."""
    found: nn.Module = model.__dict__.get(_WRAPPER, model)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a wrapper of :func:`wrap`, or the model itself."""
    return model.module if isinstance(model, FullyShardedDataParallel) else model


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add."""
    return name.replace("_fsdp_wrapped_module.", "")


def clip_gradients(model: nn.Module, max_norm: float | None) -> float:
    """Clip with the wrapper inside ``model``, which knows the shards. Returns the norm before clipping."""
    root = next(each for each in model.modules() if isinstance(each, FullyShardedDataParallel))
    return float(root.clip_grad_norm_(math.inf if max_norm is None else max_norm))


@contextmanager
def gathered(outer: nn.Module) -> Iterator[None]:
    """Gather the full weights of a wrapper inside this context."""
    with FullyShardedDataParallel.summon_full_params(outer, writeback=False):
        yield


def as_forward(model: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``method`` of the wrapped model through the wrapper's forward, which gathers the weights."""

    def redirected(*arguments: Any) -> Tensor:
        model.forward = method
        try:
            found: Tensor = wrapper(model)(*arguments)
        finally:
            del model.forward
        return found

    return redirected
