"""The one place that knows how many processes train together, and that names DDP or FSDP."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


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


def micro_batch_count(local: int, strategy: Strategy) -> int:
    """How many forward and backward passes this rank must make for an update in which ``local`` hold rows.

    Under sharding every pass is a collective, so all ranks make as many as the busiest one; elsewhere a rank without
    rows still makes one, to take part in the gradient's reduction.
    """
    if is_sharded(strategy):
        return int(max([1, *gather_objects(local)]))
    return max(1, local)


@contextmanager
def gradient_sync(strategy: Strategy, *, last: bool) -> Iterator[None]:
    """Let only the last backward pass of an update reduce gradients over the ranks."""
    wait = not last and isinstance(strategy, DDPStrategy) and isinstance(strategy.model, nn.Module)
    with strategy.model.no_sync() if wait else nullcontext():  # type: ignore[union-attr, operator]
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
    if isinstance(strategy, ModelParallelStrategy):
        return bool(strategy._save_distributed_checkpoint)
    return isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded"


def global_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, over shards too; a scalar."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shard(model: nn.Module, strategy: Strategy, device_mesh: Any) -> None:
    """Shard a causal language model over the data-parallel ranks under ``ModelParallelStrategy``; else do nothing.

    Each decoder layer is one group and everything else (embedding, head, final norm: tied weights stay together)
    belongs to the root, which is the model itself, so that its forward gathers what it needs.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    mesh = device_mesh["data_parallel"]
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    # Not resharding the root would leave plain, soon stale weights behind every forward without a backward.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the full weights for the duration: one gathering for a whole rollout, and ranks free to differ in length."""
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
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, name)
    method: Callable[..., Tensor] = getattr(model, name)
    return method


def is_sharded(strategy: Strategy) -> bool:
    """True where every forward pass is a collective, because ranks hold shards of the weights."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
