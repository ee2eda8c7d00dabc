"""Names of layers in an adapter's settings, compared with the layers that there are."""

import re
from typing import Any

from peft import LoraConfig, PeftModel


def check_targets(policy: PeftModel) -> None:
    """Refuse a new adapter whose settings name a layer, or have the number of one, that the model does not have.

    peft refuses settings that match nothing at all. A mistake in one of several names would only leave that layer
    without an adapter.

    Raises:
        ValueError: naming the setting, the name that matches nothing, and the kinds of layers that there are.
    """
    settings = policy.peft_config["default"]
    if not isinstance(settings, LoraConfig):
        return
    model: Any = policy.base_model.model
    layers = [name.removesuffix(".base_layer") for name, _ in model.named_modules()]
    layers = [name for name in layers if name and ".lora_" not in name]
    for setting in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(settings, setting) or ()
        for name in () if isinstance(names, str) else sorted(names):  # a text is a pattern, or all linear layers
            if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
                raise _mistake(setting, name, layers)
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, setting) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", layer) for layer in policy.targeted_module_names):
                raise _mistake(setting, pattern, policy.targeted_module_names)
    chosen = settings.layers_to_transform or []
    numbers = {int(match[1]) for layer in layers if (match := re.match(r".*?\.(\d+)(\.|$)", layer))}
    for number in [chosen] if isinstance(chosen, int) else chosen:
        if numbers and number not in numbers:
            raise ValueError(
                f"`lora` has the number {number} in `layers_to_transform`, and the model's layers are "
                f"{min(numbers)} to {max(numbers)}. Correct or remove it."
            )


def _mistake(setting: str, name: str, layers: list[str]) -> ValueError:
    kinds = sorted({layer.rpartition(".")[2] for layer in layers if not layer.rpartition(".")[2].isdecimal()})
    adapted = " with an adapter" if setting.endswith("_pattern") else ""
    return ValueError(
        f"`lora` has the name {name!r} in `{setting}`, and there is no such layer{adapted}. Correct or remove it. The "
        f"layers are called {', '.join(kinds)}."
    )
