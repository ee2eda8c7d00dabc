"""Comparing the optimizer of a checkpoint with the one that is to go on from it.

Torch takes over the groups of a checkpoint whole, with every argument, and does not look at the class. A checkpoint
therefore notes the class, and the arguments as they were before a schedule changed them.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_lambdapo.checkpointing.files import CheckpointError

#: What torch, schedules and averages add to a group's arguments.
_ADDED = ("params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
#: How something is computed, and not what. Releases of torch have added some of them.
_SWITCHES = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
#: Base classes that say nothing about the state.
_ROOTS = ("torch.optim.optimizer.Optimizer", "bitsandbytes.optim.optimizer.Optimizer8bit")
_MISSING = object()


def describe(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's class, its bases, and the arguments of its groups, as plain data, before a schedule is built.

    Example:
        >>> import torch
        >>> describe(torch.optim.Adagrad([torch.zeros(1)], lr=0.5))["groups"][0]["lr"]
        0.5
    """
    first, *bases = [_path(each) for each in type(optimizer).__mro__ if issubclass(each, Optimizer)]
    kept = [name for name in bases if name not in _ROOTS]
    return {"class": first, "bases": kept, "groups": _arguments(optimizer.param_groups)}


def noted(checkpoint: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same of the optimizer in a checkpoint, None if it has none.

    Checkpoints of earlier releases have no class, and no original value of what a schedule beside the rate changes.

    Args:
        checkpoint: its entries.
        own: those of this package.
    """
    if isinstance(own.get("optimizer"), Mapping):
        return dict(own["optimizer"])
    states = checkpoint.get("optimizer_states") or [None]
    groups = states[0].get("param_groups") if isinstance(states[0], Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return None
    found = _arguments(groups)
    schedules = [each for each in checkpoint.get("lr_schedulers") or [] if isinstance(each, Mapping)]
    cyclic = any("max_lrs" in each for each in schedules)  # the lowest rate is the initial one then
    unknown = {*_SWITCHES, *(["lr"] if cyclic else [])}
    for arguments, group in zip(found, groups, strict=True):
        arguments.update({"lr": _plain(group["initial_lr"])} if "initial_lr" in group else {})
        unknown |= {"lr"} if "max_lr" in group else set()  # one cycle
        unknown |= {"betas", "momentum"} & arguments.keys() if "max_momentum" in group else set()
    known = [{name: value for name, value in group.items() if name not in unknown} for group in found]
    return {"class": None, "groups": known, "unknown": sorted(unknown)}


def compare(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse an optimizer that cannot go on from a checkpoint, and warn of arguments that will have no effect.

    Args:
        saved: description of the checkpoint's.
        given: description of the one that is to go on.

    Returns:
        The description of what goes on: the class that is given, with the checkpoint's arguments.

    Raises:
        CheckpointError: it has another kind of state, or other groups.
    """
    change = _change(saved, given)
    if change is not None:
        raise CheckpointError(
            f"{change}. Give the `optimizer` of the run that wrote it. Or start a new run from its weights, which "
            "`lambdapo export` writes."
        )
    different: dict[str, None] = {}
    groups: list[dict[str, Any]] = []
    for before, now in zip(saved["groups"], given["groups"], strict=True):
        groups.append({**now, **before})
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                different[f"{name}={before[name]} stays, and {name}={now[name]} has no effect"] = None
    another = saved["class"] not in (None, given["class"])
    if different or another:
        told = f"The optimizer goes on from the checkpoint's {saved['class'] or 'one'}, whose arguments it keeps"
        rank_zero_warn(
            f"{told}: {', '.join(different)}. To train with others, start a new run from the checkpoint's weights, "
            "which `lambdapo export` writes."
            if different
            else f"{told}. It is {given['class']} here."
        )
    return {**given, "groups": groups}


def _change(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """What keeps the optimizer from going on, if anything does."""
    before, now = saved["groups"], given["groups"]
    more = saved.get("unknown", ())
    names = [
        sorted({*found, *(name for group in groups for name in group)} - _SWITCHES)
        for groups, found in ((before, more), (now, ()))
    ]
    if saved["class"] is None and names[0] != names[1]:
        return (
            f"its optimizer has the arguments {', '.join(names[0])}, and {given['class']}, which is given, has "
            f"{', '.join(names[1])}"
        )
    if saved["class"] not in (None, given["class"]):
        families = [{each["class"], *each["bases"]} for each in (saved, given)]
        if names[0] != names[1] or families[0].isdisjoint(families[1]):
            return f"its optimizer is {saved['class']}, whose state {given['class']}, which is given, cannot go on from"
    if len(before) != len(now):
        return f"its optimizer has {len(before)} groups of parameters, and the one that is given has {len(now)}"
    return None


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _arguments(groups: Any) -> list[dict[str, Any]]:
    """Arguments of groups that are plain data."""
    plain = [{name: _plain(value) for name, value in group.items() if name not in _ADDED} for group in groups]
    return [{name: value for name, value in group.items() if value is not _MISSING} for group in plain]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        parts = [_plain(each) for each in value]
        return _MISSING if any(each is _MISSING for each in parts) else parts
    return value if value is None or type(value) in (bool, int, float, str) else _MISSING
