"""An adapter over a base whose weights are not loaded, to save it."""

from collections.abc import Mapping
from contextlib import suppress
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lightning_lambdapo.config import AdapterConfig, PolicyConfig
from lightning_lambdapo.policy.loading import locate


def adapter_alone(config: PolicyConfig, adapter: AdapterConfig | None) -> PeftModel | None:
    """The policy with no tensor in memory, all of them on torch's meta device. Only the base's configuration is read.

    Args:
        config: where the model comes from.
        adapter: the settings of the adapter. None reads those of ``config.adapter``.

    Returns:
        None if the policy is no LoRA over quantised weights, or if such an adapter starts from the base's weights.
    """
    if config.quantization is None or config.model.endswith(".gguf") or (adapter is None and config.adapter is None):
        return None
    chosen = PeftConfig.from_pretrained(cast(str, config.adapter)) if adapter is None else adapter.to_peft()
    plain = isinstance(chosen, LoraConfig) and isinstance(chosen.init_lora_weights, bool)
    if not plain or chosen.use_dora or chosen.trainable_token_indices:
        return None
    chosen.inference_mode = False
    location, options = locate(config)
    settings = AutoConfig.from_pretrained(location, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=config.torch_dtype)
        model.name_or_path = location
        with suppress(OSError):  # without a file, the one that the configuration gives
            model.generation_config = GenerationConfig.from_pretrained(location, **options)
        model.requires_grad_(False)
        return cast(PeftModel, get_peft_model(model, chosen))


def place(policy: PeftModel, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Give a policy from :func:`adapter_alone` its trained tensors.

    Args:
        policy: the policy, changed in place.
        tensors: trained tensors, by name.
        prefix: of their names.
    """
    trained = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    policy.load_state_dict(trained, strict=False, assign=True)
