"""Comparing the policy of a checkpoint with the policy that is to load it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lambdapo.checkpointing.files import CheckpointError

#: What earlier releases noted among the hyper-parameters.
_EARLIER = ("lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights")
#: Rounding to bfloat16 changes a value by at most a 256th of itself, and to float16 by at most half of 2**-24.
_RELATIVE, _ABSOLUTE = 1.02 / 256, 4e-8


def compare(saved: Mapping[str, Any], current: Mapping[str, Any], hyper_parameters: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose adapter has other settings, or whose base has other weights.

    Args:
        saved: the policy's fingerprint in the checkpoint. Empty in checkpoints of earlier releases.
        current: that of the policy that is to load it.
        hyper_parameters: the checkpoint's, which name the adapter's settings in earlier releases too.

    Raises:
        CheckpointError: they differ. The message says how.
    """
    adapter, own = saved.get("adapter"), current.get("adapter")
    if "adapter" not in saved and own is not None:
        adapter = _named_adapter(hyper_parameters)
        own = {name: value for name, value in own.items() if name in _EARLIER}
    if adapter is not None and own is not None:
        _compare_adapters(adapter, own)
    _compare_bases(saved.get("base") or {}, current.get("base") or {})


def compare_given(saved: Mapping[str, Any], hyper_parameters: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Compare the settings of an adapter that take the place of a checkpoint's own.

    Args:
        saved: the policy's fingerprint in the checkpoint. Only without one is there something to compare.
        hyper_parameters: the checkpoint's.
        given: arguments of the module that replace some of them.

    Raises:
        CheckpointError: they differ. The message says how.
    """
    lora = given.get("lora")
    if dataclasses.is_dataclass(lora) and not isinstance(lora, type):
        lora = dataclasses.asdict(lora)
    one, other = _named_adapter(hyper_parameters), _named_adapter({"lora": lora})
    if not saved and one is not None and other is not None:
        _compare_adapters(one, other)


def _compare_adapters(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    different = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
    if different:
        listed = ", ".join(
            f"{name} is {saved.get(name, 'not set')} there and {current.get(name, 'not set')} here"
            for name in different
        )
        raise CheckpointError(
            f"its adapter was trained with other settings, which change what its weights mean: {listed}. Build the "
            "module with the `lora` settings of the run that wrote it."
        )


def _compare_bases(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    for name in saved.keys() & current.keys():
        one, other = saved[name].double(), current[name].double()
        if one.shape == other.shape and torch.isclose(one, other, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True).all():
            continue
        count = f"values of {name} differ" if one.shape == other.shape else f"{name} has another shape"
        raise CheckpointError(
            f"it was trained over another base: {count}. Set `policy.model` (and `policy.revision`) to the base of the "
            "run that wrote it."
        )


def _named_adapter(hyper_parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of an ``AdapterConfig`` among hyper-parameters. None if they name none."""
    lora = hyper_parameters.get("lora")
    if not isinstance(lora, Mapping) or "alpha" not in lora:
        return None
    found = {**(lora.get("options") or {}), "lora_alpha": lora["alpha"]}
    if str(found.get("init_lora_weights")).lower() not in ("pissa", "olora"):
        found["init_lora_weights"] = None
    return {name: found[name] for name in _EARLIER if found.get(name)}
