"""The one place that knows how many processes train together, and that names DDP or FSDP."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_lambdapo.distributed import fsdp1
from lightning_lambdapo.distributed.lightning_internals import writes_shards


def world_size() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Index of this process among them."""
    return distributed.get_rank() if _is_distributed() else 0


def gather_objects(value: Any) -> list[Any]:
    """The small plain-data ``value`` of every rank, in rank order; a collective."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def global_occurrences(prompt_ids: list[int]) -> list[int]:
    """How often each prompt came up earlier in the global batch; a collective.

    The global batch is ordered as ``DistributedSampler`` deals it: position ``i`` of rank ``r`` is ``i * world + r``.
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
    """Unbiased standard deviation over all ranks' values; 0 for fewer than two; a collective."""
    everything = torch.tensor([value for part in gather_objects(values.tolist()) for value in part]).double()
    std = everything.std() if len(everything) > 1 else everything.new_zeros(())
    return std.to(values)


def idle_passes(local: int, strategy: Strategy) -> int:
    """How many passes through the model this rank makes beyond its own ``local`` ones; a collective under sharding.

    There every pass is a collective, so that all ranks make as many as the busiest one.
    """
    return int(max([1, *gather_objects(local)])) - local if is_sharded(strategy) else 0


def replicates(strategy: Strategy) -> bool:
    """True where each rank holds the whole model, and a backward pass sums gradients over ranks."""
    return isinstance(strategy, DDPStrategy) and isinstance(strategy.model, nn.parallel.DistributedDataParallel)


@contextmanager
def local_gradients(strategy: Strategy) -> Iterator[None]:
    """Let backward passes add to this rank's own gradients alone, where ranks hold the whole model."""
    with strategy.model.no_sync() if replicates(strategy) else nullcontext():  # type: ignore[union-attr, operator]
        yield


@contextmanager
def without_grad_scaler(strategy: Strategy) -> Iterator[None]:
    """Let the optimizer step as if there were no float16 gradient scaler, which refuses to step without gradients."""
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
    """True where each rank writes its shard of everything, so that no tensor may be left out."""
    return is_sharded(strategy) and writes_shards(strategy)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None, strategy: Strategy) -> float:
    """Scale all gradients together to a Euclidean norm of at most ``max_norm``, unless theirs is not finite.

    Args:
        parameters: those that have a gradient.
        max_norm: None leaves the gradients as they are.
        strategy: under ``FSDPStrategy`` the wrapped model knows which gradients are shards.

    Returns:
        The norm before clipping, over the shards of all ranks too; a collective where there are shards.
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
    """All weights of ``model`` whole, on the CPU of rank 0 and an empty mapping elsewhere; a collective under FSDP2."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        weights: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        weights = model.state_dict() if rank() == 0 else {}
    return dict(weights)


def shard(model: nn.Module, strategy: Strategy, device_mesh: Any) -> nn.Module:
    """Shard a causal language model over the data-parallel ranks, where the strategy is one that does.

    Each decoder layer is one group and everything else (embedding, head, final norm: tied weights stay together)
    belongs to the root, which is the model itself, so that its forward gathers what it needs.

    Returns:
        What takes the model's place: itself, but a wrapper of it under ``FSDPStrategy``.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if isinstance(strategy, FSDPStrategy):
        return fsdp1.wrap(model, strategy, layers)
    if isinstance(strategy, ModelParallelStrategy):
        mesh = device_mesh["data_parallel"]
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        # Not resharding the root would leave plain, soon stale weights behind every forward without a backward.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the full weights for the duration: one gathering for a whole rollout, and ranks free to differ in length."""
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


def as_forward(model: nn.Module, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Bind ``function`` to ``model`` as method ``name`` that gathers sharded weights just as its forward does."""
    setattr(model, name, function.__get__(model))
    method: Callable[..., Tensor] = getattr(model, name)
    if fsdp1.wrapper(model) is not model:
        return fsdp1.as_forward(model, method)
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, name)
        method = getattr(model, name)
    return method


def is_sharded(strategy: Strategy) -> bool:
    """True where every forward pass is a collective, because ranks hold shards of the weights."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
