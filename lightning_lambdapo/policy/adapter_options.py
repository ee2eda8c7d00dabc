"""peft's LoRA settings: which of them train the policy that they describe, and why the others are refused.

The policy before training is the reference, an export must be that policy for every reader, and a checkpoint has the
trained tensors alone. Settings that break one of these are refused before weights are loaded.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_lambdapo.config import AdapterConfig

_NO_DATA = "which needs a pass over data that this package does not make, and without it is another initialisation"
#: Values of ``init_lora_weights`` that are refused, with the reason.
REFUSED_STARTS = {
    "eva": _NO_DATA,
    "corda": _NO_DATA,
    "lora_ga": _NO_DATA,
    "loftq": "which changes the base by more than an adapter can express, so that no adapter could be exported",
    "mica": "which freezes half of the adapter, and a checkpoint has the trained half alone",
    "pissa_niter": "whose change of the base is random, so that a checkpoint could not be loaded under another seed. "
    "`pissa` computes the same change exactly",
}
#: Values that subtract the initial adapter from the base. The reference and an export need that adapter.
BASE_CHANGING_STARTS = ("pissa", "olora")
#: Options that are refused, with the reason.
REFUSED_OPTIONS = {
    "alora_invocation_tokens": "rollouts would need the position of these tokens in each row",
    "arrow_config": "it routes between several adapters, and one is trained",
    "corda_config": "it belongs to `init_lora_weights: corda`, which is refused",
    "ensure_weight_tying": "peft ties two adapters by memory that they share, which moving them to a GPU ends",
    "eva_config": "it belongs to `init_lora_weights: eva`, which is refused",
    "inference_mode": "it freezes the adapter, so that nothing would be trained",
    "kasa_config": "it removes parts of the base, and needs a loss of its own",
    "layer_replication": "the base then has other layers than its configuration says. Make the deeper model first, and "
    "set `policy.model` to it",
    "loftq_config": "it belongs to `init_lora_weights: loftq`, which is refused",
    "lora_ga_config": "it belongs to `init_lora_weights: lora_ga`, which is refused",
    "megatron_config": "layers of Megatron are not supported",
    "monteclora_config": "its weights are random in every pass, and rollouts and learning must use the same policy",
    "runtime_config": "none of its settings has an effect here",
    "use_qalora": "it needs a GPTQ model, whose weights this package does not train over",
    "velora_config": "its gradients depend on how rows are split into micro-batches",
}
#: Options that ``lora`` has by another name, or sets itself.
_NAMED = {
    "r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.target_modules",
    "task_type": None,
    "peft_type": None,
}


def adapter_settings(adapter: AdapterConfig | PeftConfig, *, quantized: bool) -> PeftConfig:
    """The settings of an adapter as peft's, if this package can train with them.

    Args:
        adapter: the settings.
        quantized: the base is quantised.

    Raises:
        ValueError: they cannot be used. The message says why.
    """
    if not isinstance(adapter, AdapterConfig):
        check_adapter(adapter, quantized=quantized)
        return adapter
    for name in adapter.options:
        if name in _NAMED:
            instead = "remove it" if _NAMED[name] is None else f"set `{_NAMED[name]}` instead"
            raise ValueError(f"`lora.options.{name}` is set by `lora` itself, so {instead}.")
    _check(adapter.options, quantized=quantized)
    try:
        return adapter.to_peft()
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft does not accept `lora` with the options {adapter.options}: {error}") from error


def check_adapter(settings: PeftConfig, *, quantized: bool) -> None:
    """Refuse settings of a LoRA adapter that this package cannot train with.

    Args:
        settings: peft's.
        quantized: the base is quantised.

    Raises:
        ValueError: they cannot be used. The message says why.
    """
    if not isinstance(settings, LoraConfig):
        return
    default = LoraConfig()
    given = {each.name: getattr(settings, each.name) for each in dataclasses.fields(settings) if each.init}
    _check({k: v for k, v in given.items() if v != getattr(default, k)}, quantized=quantized)


def changes_base(settings: PeftConfig) -> bool:
    """True if building the adapter changes the base, see :data:`BASE_CHANGING_STARTS`."""
    return isinstance(settings, LoraConfig) and _start(vars(settings)) in BASE_CHANGING_STARTS


def check_start(settings: PeftConfig, model: PreTrainedModel) -> None:
    """Refuse an initialisation that changes the base in a way that the model does not allow.

    Args:
        settings: peft's.
        model: the base, with the adapter's layers or without.

    Raises:
        ValueError: layers store their weights transposed, or an adapted end shares its weights with the other end.
    """
    if not changes_base(settings):
        return
    start = _start(vars(settings))
    if start == "olora" and any(isinstance(module, Conv1D) for module in model.modules()):
        raise ValueError(
            "`lora.options.init_lora_weights` is 'olora', which peft computes wrongly for the transposed layers of "
            f"{type(model).__name__}. Use 'pissa' or true."
        )
    if share_adapted_weights(model):
        raise ValueError(
            f"`lora.options.init_lora_weights` is {start!r}, which changes the adapted weights, and embedding and "
            "output head share theirs. Remove both from `lora.target_modules`, or set `init_lora_weights` to true."
        )


def share_adapted_weights(model: PreTrainedModel) -> bool:
    """True if embedding and output head share their weights, and one of them has an adapter."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    layers = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    adapted = any(isinstance(end, BaseTunerLayer) for end in ends)
    return adapted and None not in layers and layers[0].weight is layers[1].weight


def plain_start(settings: PeftConfig) -> PeftConfig:
    """A copy of the settings for a second adapter, which leaves the base alone. Its weights are to be loaded."""
    found = copy.deepcopy(settings)
    if isinstance(found, LoraConfig):
        found.init_lora_weights = True
        found.bias = "none"  # peft allows biases to one adapter
    return found


def _start(options: Mapping[str, Any]) -> str | None:
    value = options.get("init_lora_weights", True)
    return value.lower() if isinstance(value, str) else None


def _check(options: Mapping[str, Any], *, quantized: bool) -> None:
    start = _start(options) or ""
    for refused, reason in REFUSED_STARTS.items():
        if start.startswith(refused):
            raise ValueError(
                f"`lora.options.init_lora_weights` is {start!r}, {reason}. Use true, 'gaussian', 'orthogonal', 'pissa' "
                "or 'olora'."
            )
    for name, reason in REFUSED_OPTIONS.items():
        if options.get(name) not in (None, False):
            raise ValueError(f"`lora.options.{name}` cannot be used here: {reason}. Remove it.")
    if start not in BASE_CHANGING_STARTS:
        return
    if quantized:
        raise ValueError(
            f"`lora.options.init_lora_weights` is {start!r}, which changes the base, and quantising the changed base "
            "gives another policy. Set `policy.quantization` to null, or `init_lora_weights` to true."
        )
    for name in ("use_dora", "use_bdlora", "target_parameters"):
        if options.get(name):
            raise ValueError(
                f"`lora.options.{name}` cannot be combined with `init_lora_weights: {start}`: its adapter could not be "
                "exported for the unchanged base. Remove one of them."
            )
