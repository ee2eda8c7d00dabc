"""What a checkpoint notes of its policy: the adapter's settings, and a few values of the frozen base."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from lightning_lambdapo.policy.adapter_options import changes_base
from lightning_lambdapo.policy.model import Policy, causal_lm

#: Settings that change what the trained tensors mean, and not their shapes.
COMPARED = (
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "use_bdlora",
)
_TENSORS = 16
_VALUES = 32


def fingerprint(policy: Policy) -> dict[str, Any]:
    """Plain data and small tensors by which a checkpoint recognises its policy, before its weights are in shards.

    The base is known by some values of some frozen tensors: embeddings, norms and matrices, spread over the model. They
    are the same in every type up to its rounding. Tensors that are trained, quantised or changed by the adapter's
    initialisation are omitted, so that a base is recognised when it is loaded in another way. Reading them is cheap for
    a model of any size.

    Args:
        policy: as training starts from it.

    Returns:
        ``"adapter"``: settings of a LoRA adapter, None without one. ``"base"``: values in float32, by tensor.
    """
    return {"adapter": _adapter(policy), "base": _base(policy)}


def _adapter(policy: Policy) -> dict[str, Any] | None:
    settings = policy.peft_config.get("default") if isinstance(policy, PeftModel) else None
    if not isinstance(settings, LoraConfig):
        return None
    given = {name: _plain(getattr(settings, name, None)) for name in COMPARED}
    if changes_base(settings):
        given["init_lora_weights"] = settings.init_lora_weights
    return {name: value for name, value in given.items() if value}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@torch.no_grad()
def _base(policy: Policy) -> dict[str, Tensor]:
    model = causal_lm(policy)
    changed = isinstance(policy, PeftModel) and any(map(changes_base, policy.peft_config.values()))
    found: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters():
        if "lora_" not in path and ".modules_to_save." not in path and "trainable_tokens_" not in path:
            found[_own_name(path)] = parameter
    small = [name for name, value in found.items() if value.ndim < 2 or "embed" in name or "wte" in name]
    large = [name for name in found if name not in set(small)]
    adapted = {_own_name(path) for path, _ in model.named_parameters() if changed and ".base_layer." in path}
    return {
        name: _values(found[name])
        for name in (*_spread(sorted(small)), *_spread(sorted(large)))
        if _is_plain(found[name]) and name not in adapted
    }


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and not parameter.requires_grad and not parameter.is_meta


def _own_name(path: str) -> str:
    """The name of a parameter in the base alone."""
    for wrapper in (".base_layer", ".original_module", ".token_adapter"):
        path = path.replace(wrapper, "")
    return path


def _spread(names: Sequence[str]) -> list[str]:
    step = max(1, len(names) / _TENSORS)
    return [names[int(index * step)] for index in range(min(_TENSORS, len(names)))]


def _values(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)].float().cpu()
