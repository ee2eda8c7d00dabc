"""The only file that knows how many processes train together, and that names DDP or FSDP."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_lambdapo.distributed import fsdp1
from lightning_lambdapo.distributed.lightning_internals import writes_shards

#: The default process group, and the gloo group beside it.
_object_groups: dict[str, Any] = {}


def world_size() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Index of this process among them."""
    return distributed.get_rank() if _is_distributed() else 0


def gather_objects(value: Any) -> list[Any]:
    """The small plain-data ``value`` of every rank, in rank order. A collective."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=_object_group())
    return values


def gather_on_first_rank(value: Any) -> list[Any]:
    """The plain-data ``value`` of every rank, in rank order, on rank 0. Empty on the others. A collective."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    distributed.gather_object(value, values or None, dst=0, group=_object_group())
    return values


def global_occurrences(prompt_ids: list[int]) -> list[int]:
    """How often each prompt occurred earlier in the global batch. A collective.

    The global batch has the order of ``DistributedSampler``: position ``i`` of rank ``r`` is ``i * world + r``.
    """
    gathered = gather_objects(prompt_ids)
    seen: Counter[int] = Counter()
    mine: list[int] = []
    for position in range(max(map(len, gathered))):
        for owner, ids in enumerate(gathered):
            if position < len(ids):
                if owner == rank():
                    mine.append(seen[ids[position]])
                seen[ids[position]] += 1
    return mine


def global_std(values: Tensor) -> Tensor:
    """Unbiased standard deviation over all ranks' values, or 0 for fewer than two. A collective."""
    gathered_values = [value for part in gather_objects(values.tolist()) for value in part]
    everything = torch.tensor(gathered_values, dtype=torch.float64)
    std = everything.std() if len(everything) > 1 else everything.new_zeros(())
    return std.to(values)


def idle_passes(local: int, strategy: Strategy) -> int:
    """Number of passes that this rank makes beyond its own ``local`` ones. A collective under sharding.

    Under sharding every pass is a collective, so all ranks make as many as the busiest one.
    """
    return int(max([1, *gather_objects(local)])) - local if is_sharded(strategy) else 0


def replicates(strategy: Strategy) -> bool:
    """True if each rank has the whole model, and a backward pass sums gradients over ranks."""
    return isinstance(strategy, DDPStrategy) and isinstance(strategy.model, nn.parallel.DistributedDataParallel)


@contextmanager
def local_gradients(strategy: Strategy) -> Iterator[None]:
    """Keep gradients on this rank inside this context, if each rank has the whole model."""
    with strategy.model.no_sync() if replicates(strategy) else nullcontext():  # type: ignore[union-attr, operator]
        yield


@contextmanager
def without_grad_scaler(strategy: Strategy) -> Iterator[None]:
    """Step without the float16 gradient scaler, because it refuses to step without gradients."""
    plugin = strategy.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    if scaler is None:
        yield
        return
    plugin.scaler = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        plugin.scaler = scaler  # type: ignore[attr-defined]


def saves_shards(strategy: Strategy) -> bool:
    """True if each rank writes its shard of everything, so that no tensor may be omitted."""
    return is_sharded(strategy) and writes_shards(strategy)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None, strategy: Strategy) -> float:
    """Scale all gradients together to a Euclidean norm of at most ``max_norm``, unless the norm is not finite.

    Args:
        parameters: those that have a gradient.
        max_norm: None does not clip.
        strategy: under ``FSDPStrategy`` the wrapped model knows which gradients are shards.

    Returns:
        The norm before clipping, over the shards of all ranks. A collective if there are shards.
    """
    if fsdp1.flattens(strategy) and strategy.model is not None:
        return fsdp1.clip_gradients(strategy.model, max_norm)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None and math.isfinite(norm):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The full weights of ``model`` on the CPU of rank 0, an empty mapping elsewhere. A collective under FSDP2."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        weights: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        weights = model.state_dict() if rank() == 0 else {}
    return dict(weights)


def shard(model: nn.Module, strategy: Strategy, device_mesh: Any) -> nn.Module:
    """Shard a causal language model over the data-parallel ranks, if the strategy shards.

    Each decoder layer is one group. Everything else (embedding, head, final norm) belongs to the root, which keeps tied
    weights together. The root is the model itself, so its forward gathers what it needs. Under ``bf16-mixed`` and
    ``16-mixed`` weights are gathered in 16 bits.

    Returns:
        The model to use instead: a wrapper under ``FSDPStrategy``, else the model itself.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if isinstance(strategy, FSDPStrategy):
        return fsdp1.wrap(model, strategy, layers)
    if isinstance(strategy, ModelParallelStrategy):
        settings = {"mesh": device_mesh["data_parallel"], "mp_policy": _mixed_precision(model, strategy)}
        for layer in layers:
            fully_shard(layer, **settings)
        # Without resharding, every forward without a backward would leave plain weights that soon are stale.
        fully_shard(model, reshard_after_forward=True, **settings)
    return model


def _mixed_precision(model: nn.Module, strategy: Strategy) -> MixedPrecisionPolicy:
    """Gather weights in autocast's dtype, and sum gradients over ranks in float32. Shards keep their dtype.

    Quantised weights are gathered as they are: older releases of torch would cast their bytes.
    """
    narrow = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(strategy.precision_plugin.precision))
    kinds = {parameter.dtype for parameter in model.parameters()}
    if narrow is None or not kinds <= {torch.float32, torch.bfloat16, torch.float16}:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather the full weights once inside this context, so that ranks may decode different numbers of tokens."""
    outer = fsdp1.wrapper(model)
    if outer is not model:
        with fsdp1.gathered(outer):
            yield
        return
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


def has_shards(model: nn.Module) -> bool:
    """True if each rank holds only a shard of the weights of ``model``, which are gathered to compute with."""
    return fsdp1.wrapper(model) is not model or any(isinstance(module, FSDPModule) for module in model.modules())


def as_forward(model: nn.Module, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Bind ``function`` to ``model`` as method ``name`` that gathers sharded weights as its forward does."""
    setattr(model, name, function.__get__(model))
    method: Callable[..., Any] = getattr(model, name)
    if fsdp1.wrapper(model) is not model:
        return fsdp1.as_forward(model, method)
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, name)
        method = getattr(model, name)
    return method


def is_sharded(strategy: Strategy) -> bool:
    """True if every forward pass is a collective, because each rank has only a shard of the weights."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def _object_group() -> Any:
    """The processes that exchange objects: all of them. NCCL would send objects through the GPU, so gloo is used then.

    The group is made at the first exchange, which is a collective, and again if the processes have met anew.
    """
    world = distributed.group.WORLD
    if distributed.get_backend() != "nccl":
        return world
    if _object_groups.get("world") is not world:
        _object_groups.update(world=world, gloo=distributed.new_group(backend="gloo"))
    return _object_groups["gloo"]


def _is_distributed() -> bool:
    """A group of one process, which vLLM makes, has nothing to exchange."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
