"""The policy's weights in the forms that vLLM takes: a base directory, an adapter directory, named tensors."""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_lambdapo.config import PolicyConfig
from lightning_lambdapo.distributed.fsdp1 import plain_name
from lightning_lambdapo.policy.adapter_options import changes_base
from lightning_lambdapo.policy.decoding import can_dequantize, dequantized, is_quantized
from lightning_lambdapo.policy.loading import cached_directory, locate
from lightning_lambdapo.policy.model import Policy, causal_lm

#: Ranks that vLLM has kernels for.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check_servable(policy: Policy, config: PolicyConfig) -> None:
    """Refuse a policy of which vLLM would serve only a part.

    Raises:
        ValueError: naming trained tensors that vLLM does not take, or a layer of another format.
    """
    if config.dtype == "float64":
        raise ValueError("vLLM does not compute in float64. Set `policy.dtype` to float32, bfloat16 or float16.")
    if not isinstance(policy, PeftModel):
        return
    kind = policy.peft_config["default"].peft_type
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    strange = [
        name for name in trained if ".lora_A.default.weight" not in name and ".lora_B.default.weight" not in name
    ]
    variants = [name for name, layer in _layers(policy) if "default" in getattr(layer, "lora_variant", {})]
    if strange or variants:
        what = f"the trained tensor {strange[0]}" if strange else f"the variant of LoRA (DoRA, ...) in {variants[0]}"
        raise ValueError(
            f"vLLM would decode without {what}: it takes the LoRA weights of linear layers, and nothing else of this "
            f"adapter ({kind}). Set `lora` to plain LoRA (no `use_dora`, `modules_to_save`, `bias`, no embedding among "
            "`target_modules`), or `rollout.engine: grouped`."
        )
    adapter_rank(policy)


def adapter_rank(policy: PeftModel) -> int:
    """The rank that vLLM must be started with: the adapter's largest, rounded up to one that vLLM has."""
    largest = max(layer.r["default"] for _, layer in _layers(policy))
    fitting = [rank for rank in _RANKS if rank >= largest]
    if not fitting:
        raise ValueError(f"vLLM serves adapters up to rank {_RANKS[-1]}, and this one has {largest}. Lower `lora.r`.")
    return fitting[0]


@torch.no_grad()
def write_adapter(policy: PeftModel, directory: Path) -> None:
    r"""Write the LoRA weights so that vLLM computes :math:`W x + s B A x` exactly as the policy does.

    Each layer's own scale :math:`s` is multiplied into B, and smaller ranks are filled up with zeros. vLLM reads one
    rank and one scale for all layers, and would ignore ``alpha_pattern`` and ``rank_pattern``.
    """
    layers = list(_layers(policy))
    rank = max(layer.r["default"] for _, layer in layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers:
        missing = rank - layer.r["default"]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, missing)).cpu().contiguous()
        scaled = up * layer.scaling["default"]
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(scaled, (0, missing)).cpu().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors")


def base_directory(policy: Policy, config: PolicyConfig) -> tuple[str, str | None]:
    """Where vLLM finds the policy's base, and its revision: where it was loaded from, or a copy in the cache.

    A quantised base is written in full, in the type that it computes in, so that vLLM decodes with the same rounded
    weights. So are a base from a GGUF file, and one that was not loaded from a directory.
    """
    model = causal_lm(policy)
    place, options = locate(config)
    adapters = policy.peft_config.values() if isinstance(policy, PeftModel) else ()
    changed = any(changes_base(settings) for settings in adapters)
    plain = config.quantization is None and "gguf_file" not in options and not changed
    if plain and model.config.name_or_path == place:
        return place, config.revision
    layers = [(name, layer) for name, layer in model.named_modules() if not isinstance(layer, LoraLayer)]
    names = [name for name, layer in layers if is_quantized(layer) and not can_dequantize(layer)]
    if names:
        raise ValueError(f"The layer {names[0]} is quantised in a format that cannot be written in full for vLLM.")
    digest = hashlib.sha256(json.dumps([model.config.to_diff_dict(), config.dtype], default=str).encode())
    for name, tensor in _base_tensors(model).items():
        digest.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    written = cached_directory("vllm_base", digest.hexdigest()[:32], lambda directory: _write_base(model, directory))
    return str(written), None


def checkpoint_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The base's weights by the names of its checkpoint file, layer by layer. Call it where weights are gathered."""
    model = causal_lm(policy)
    yield from revert_weight_conversion(model, _base_tensors(model)).items()


def write_weights(policy: Policy, directory: Path) -> None:
    """Write :func:`checkpoint_tensors` to a directory."""
    save_torch_state_dict({name: each.cpu().contiguous() for name, each in checkpoint_tensors(policy)}, directory)


def pack_tied_head(model: Any) -> None:
    """Let vLLM's model on a CPU use the new weights of an output head that is the embedding.

    Its kernels pack a copy of each linear layer's weight. ``reload_weights`` packs those that it loads, and a tied head
    has no weight of its own.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(head, "quant_method", None) is not None:
        head.quant_method.process_weights_after_loading(head)


@torch.no_grad()
def _write_base(model: PreTrainedModel, directory: Path) -> None:
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(directory)
    write_weights(model, directory)


def _base_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and saved buffers without adapters, quantised ones in full, each tied tensor once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, layer in model.named_modules():
        saved = [
            each for each in layer.named_buffers(recurse=False) if each[0] not in layer._non_persistent_buffers_set
        ]
        for name, tensor in (*layer.named_parameters(recurse=False), *saved):
            full = f"{path}.{name}" if path else name
            if ".lora_" in f".{full}" or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            value = tensor.detach()
            if name == "weight" and is_quantized(layer):
                value = dequantized(layer).to(getattr(layer, "compute_dtype", None) or model.dtype)
            found[_plain(full)] = value
    return found


def _layers(policy: PeftModel) -> Iterator[tuple[str, Any]]:
    """The adapted layers by their names in the adapter's file."""
    for name, module in policy.named_modules():
        if isinstance(module, LoraLayer) and "default" in cast(Any, module).r:
            yield _plain(name), module


def _plain(name: str) -> str:
    """A name without what peft and strategies wrap around modules."""
    name = plain_name(name)
    for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod.", "base_layer."):
        name = name.replace(wrapper, "")
    return name
