"""All that ``FSDPStrategy`` alone needs; readers of the rest can skip this file.

``strategy: fsdp`` is what Lightning's users type, and it means FSDP1: it flattens parameters and puts a wrapper around
the model. ``ModelParallelStrategy`` (FSDP2) needs nothing of this.
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
    """True under ``FSDPStrategy``: a parameter is this rank's piece of a flat tensor, and its shape says nothing."""
    return isinstance(strategy, FSDPStrategy)


def wrap(model: nn.Module, strategy: FSDPStrategy, layers: Sequence[nn.Module]) -> nn.Module:
    """Wrap the model by the strategy's own settings.

    Lightning would make the whole training step one forward pass of its wrapper. Such a pass cannot hold a rollout and
    several backward passes.
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
    """What to call in place of ``model``, so that its weights are gathered; itself where nothing wraps it."""
    found: nn.Module = model.__dict__.get(_WRAPPER, model)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """What :func:`wrap` has wrapped, or the model itself."""
    return model.module if isinstance(model, FullyShardedDataParallel) else model


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    return name.replace("_fsdp_wrapped_module.", "")


def clip_gradients(model: nn.Module, max_norm: float | None) -> float:
    """Clip by the wrapper inside ``model``, which knows which gradients are shards; the norm before."""
    root = next(each for each in model.modules() if isinstance(each, FullyShardedDataParallel))
    return float(root.clip_grad_norm_(math.inf if max_norm is None else max_norm))


@contextmanager
def gathered(outer: nn.Module) -> Iterator[None]:
    """Hold the full weights of a wrapper for the duration."""
    with FullyShardedDataParallel.summon_full_params(outer, writeback=False):
        yield


def as_forward(model: nn.Module, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Call ``method`` of the wrapped model by way of the wrapper's forward, which gathers the weights."""

    def redirected(*arguments: Any) -> Tensor:
        model.forward = method
        try:
            found: Tensor = wrapper(model)(*arguments)
        finally:
            del model.forward
        return found

    return redirected
