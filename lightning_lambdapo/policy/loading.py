"""Loading the policy: any causal language model, LoRA, QLoRA, existing adapters."""

import hashlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_lambdapo.config import AdapterConfig, PerformanceConfig, PolicyConfig
from lightning_lambdapo.policy.adapter_options import (
    adapter_settings,
    changes_base,
    check_adapter,
    check_start,
    plain_start,
)
from lightning_lambdapo.policy.adapter_targets import check_targets
from lightning_lambdapo.policy.gguf_tokens import gguf_tokenizer
from lightning_lambdapo.policy.lora import fast_linears
from lightning_lambdapo.policy.model import Policy
from lightning_lambdapo.policy.reference import REFERENCE_ADAPTER, keep_initial_adapter, trains_base

BUILTIN = "builtin:arithmetic"
_TURN = "the assistant's turn"


def load_tokenizer(config: PolicyConfig) -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer. No weights are loaded.

    Raises:
        ValueError, OSError: a setting of the policy is the path, or the hub id, of something that is not there.
    """
    for name in ("model", "tokenizer", "adapter"):
        place = getattr(config, name)
        if place is not None and place.startswith(("/", "./", "../", "~")) and not Path(place).exists():
            raise ValueError(f"`policy.{name}` is the directory {place}, which does not exist.")
    location, options = locate(config) if config.tokenizer is None else (config.tokenizer, {})
    if "gguf_file" in options:
        return gguf_tokenizer(Path(location), options["gguf_file"])
    try:
        return AutoTokenizer.from_pretrained(location, **options)
    except OSError as error:
        name = "model" if config.tokenizer is None else "tokenizer"
        raise OSError(f"`policy.{name}` is {location!r}: {' '.join(str(error).split())}") from error


def load_policy(
    config: PolicyConfig,
    adapter: AdapterConfig | PeftConfig | None,
    *,
    seed: int = 0,
    reference: bool = True,
    performance: PerformanceConfig = PerformanceConfig(),
) -> Policy:
    """Build the policy, in eval mode: base weights frozen under an adapter, all weights trainable without one.

    Args:
        config: where the model comes from.
        adapter: the adapter to add. None with ``config.adapter`` unset fine-tunes all weights.
        seed: seed of the adapter's initial weights. The global random state does not change.
        reference: keep a frozen copy of an adapter that training continues from, for :func:`reference_mode`.
        performance: which linear layers are fused.

    Raises:
        ValueError: a quantised base has no adapter, the adapter was made for another base, or its settings cannot be
            used (see :mod:`lightning_lambdapo.policy.adapter_options`).
    """
    if adapter is not None and config.adapter is not None:
        raise ValueError(
            f"Both `lora` and `policy.adapter` ({config.adapter}) are set, but an existing adapter has its own "
            "settings. Set `lora: null` to continue from it."
        )
    if config.quantization and adapter is None and config.adapter is None:
        raise ValueError(
            f"`policy.quantization` is {config.quantization} and there is no adapter: quantised weights cannot be "
            "trained. Set `lora`, or remove the quantization."
        )
    settings = _adapter_settings(config, adapter)
    model = _load_base(config)
    _silence_dropout(model)
    if config.gradient_checkpointing:
        # the name since transformers 5.23, which warns of the older one
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if settings is None:
        fast_linears(model, onednn=performance.onednn)
        model.eval()
        return model
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.adapter is not None:
            policy = _continue_adapter(model, config.adapter, settings, reference=reference)
        else:
            policy = _add_adapter(model, settings)
    if adapter is not None:
        check_targets(policy)
    fast_linears(policy, fused_lora=performance.fused_lora, onednn=performance.onednn)
    policy.eval()
    return policy


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a completion, from the generation config, the model's config and the tokenizer.

    Raises:
        ValueError: none of them names an end-of-sequence token.
    """
    ids: set[int] = set()
    for owner in (model.generation_config, model.config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        if value is not None:
            ids.update([value] if isinstance(value, int) else value)
    if not ids:
        raise ValueError(
            f"Neither the tokenizer nor the configuration of {model.config.name_or_path or type(model).__name__} names "
            "an end-of-sequence token, so no completion could ever end. Set `eos_token` on the tokenizer."
        )
    return tuple(sorted(ids))


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for.

    Two that transformers itself adds to tokenizers that never need them do not count: the token for unknown text, and
    ``<|endoftext|>`` where it is neither the end, the beginning nor the padding (with some GGUF files).

    Args:
        model: the policy's, before its weights are sharded.
        tokenizer: the policy's.
        stop_token_ids: ids that are to end completions.

    Raises:
        ValueError: a token has no embedding.
    """
    rows = _embedded(model.get_input_embeddings())
    if rows is None:
        return
    vocabulary = tokenizer.get_vocab()
    spare = {tokenizer.unk_token_id, vocabulary.get("<|endoftext|>")}
    spare -= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows and index not in spare)
    if beyond:
        raise ValueError(
            f"The tokenizer has {len(beyond)} tokens that the model has no embedding for: {beyond[0][1]!r} has the id "
            f"{beyond[0][0]}, and {model.config.name_or_path or type(model).__name__} embeds the ids 0 to {rows - 1}. "
            "Use the tokenizer that belongs to the model (`policy.tokenizer`), or a model whose embeddings have been "
            "resized to the tokenizer."
        )
    wrong = [index for index in stop_token_ids if not 0 <= index < rows]
    if wrong:
        raise ValueError(f"`rollout.stop_token_ids` has {wrong[0]}, and the model's tokens are 0 to {rows - 1}.")


def _embedded(embedding: Any) -> int | None:
    """Number of tokens that have an embedding, also under an adapter. None if the layer does not say."""
    while getattr(embedding, "num_embeddings", None) is None:
        embedding = getattr(embedding, "base_layer", None) or getattr(embedding, "original_module", None)
        if embedding is None:
            return None
    return int(embedding.num_embeddings)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str] | None:
    """Id and text of the added token with which the chat template ends an assistant's turn. None if there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _TURN}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return None
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if index != tokenizer.unk_token_id}
    after = text.rpartition(_TURN)[2] if _TURN in text else ""
    ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next(((index, str(added[index])) for index in ids if index in added), None)


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Save the policy for ``from_pretrained``: only the adapter if there is one, else the whole model.

    Args:
        policy: the policy to save.
        tokenizer: saved with it.
        directory: directory to save to.
        weights: the policy's full state dict, if its own tensors are shards. None uses its own.
    """
    if isinstance(policy, PeftModel):
        # The vocabulary is that of the base. Without this argument peft would look on the hub to check it.
        policy.save_pretrained(
            str(directory), selected_adapters=["default"], state_dict=weights, save_embedding_layers=False
        )
        if changes_base(policy.peft_config["default"]):
            _export_for_unchanged_base(policy, Path(directory), weights)
    else:
        forget_gguf(policy)
        policy.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def _export_for_unchanged_base(policy: PeftModel, directory: Path, weights: dict[str, Tensor] | None) -> None:
    r"""Rewrite a saved adapter whose initialisation has subtracted :math:`s B_0 A_0` from the base.

    :math:`W - s B_0 A_0 + s B A` is the unchanged :math:`W` with a plain adapter of twice the rank, whose factors are
    :math:`[B, -B_0]` and :math:`[A; A_0]`.
    """
    file = directory / "adapter_model.safetensors"
    trained = load_file(file)
    initial = get_peft_model_state_dict(
        policy, state_dict=weights, adapter_name=REFERENCE_ADAPTER, save_embedding_layers=False
    )
    for name, value in trained.items():
        if "lora_A" in name or "lora_embedding_A" in name:
            trained[name] = torch.cat([value, initial[name].to(value)])
        elif "lora_B" in name or "lora_embedding_B" in name:
            trained[name] = torch.cat([value, -initial[name].to(value)], dim=1)
    save_file({name: value.contiguous() for name, value in trained.items()}, file, metadata={"format": "pt"})
    settings: Any = plain_start(policy.peft_config["default"])
    factor = math.sqrt(2) if settings.use_rslora else 2  # the scale is alpha / sqrt(r), or alpha / r
    settings.r *= 2
    settings.lora_alpha *= factor
    settings.rank_pattern = {name: 2 * rank for name, rank in (settings.rank_pattern or {}).items()}
    settings.alpha_pattern = {name: factor * alpha for name, alpha in (settings.alpha_pattern or {}).items()}
    settings.bias = vars(policy.peft_config["default"])["bias"]
    settings.inference_mode = True
    settings.save_pretrained(str(directory))


def locate(config: PolicyConfig) -> tuple[str, dict[str, Any]]:
    """Arguments of ``from_pretrained`` for the base: hub id or directory, and options."""
    if config.model == BUILTIN:
        return str(Path(__file__).parents[1] / "quickstart" / "policy"), {}
    if config.model.endswith(".gguf"):
        path = Path(config.model).expanduser()
        return str(path.parent), {"gguf_file": path.name}
    return config.model, {"revision": config.revision} if config.revision else {}


def _load_base(config: PolicyConfig) -> PreTrainedModel:
    location, options = locate(config)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization is None:
        return AutoModelForCausalLM.from_pretrained(location, dtype=config.torch_dtype, **options)
    if options.pop("gguf_file", None) is not None:
        location = str(unpack_gguf(Path(config.model).expanduser()))
    if config.quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_note_of_a_cast)
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quantization,
            bnb_4bit_use_double_quant=config.double_quantization,
            bnb_4bit_compute_dtype=config.torch_dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        location, dtype=config.torch_dtype, quantization_config=quantization, **options
    )
    for module in model.modules():
        # On CPUs with AVX512-BF16 an eval-mode forward would repack the 4-bit weights in place, with loss. The kernel
        # for the new format has no gradient, so every later backward pass would be silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    return model


def _is_no_note_of_a_cast(record: logging.LogRecord) -> bool:
    """False for what bitsandbytes logs at every product of 8-bit weights with activations that are not float16."""
    return "inputs will be cast from" not in record.msg


def unpack_gguf(path: Path) -> Path:
    """Directory with the float32 weights of a GGUF file. Transformers cannot quantise one while reading it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def write(directory: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        forget_gguf(model)
        model.save_pretrained(directory)

    return cached_directory("gguf", digest, write)


def cached_directory(kind: str, name: str, write: Callable[[Path], None]) -> Path:
    """A directory of the user's cache. It is written once, whole or not at all, also by several ranks at once.

    Args:
        kind: what is in it.
        name: its key, such as a hash of what it is made from.
        write: writes it, called if there is none.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning_lambdapo" / kind
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache))
    try:
        write(scratch)
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def forget_gguf(model: PreTrainedModel) -> None:
    """Remove the GGUF settings: the weights are plain by now, but transformers would refuse to save the model."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer


def _silence_dropout(model: nn.Module) -> None:
    """Switch off the base's dropout, because rollouts and learning must use the same policy."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _adapter_settings(config: PolicyConfig, adapter: AdapterConfig | PeftConfig | None) -> PeftConfig | None:
    """The settings of the new or continued adapter, if they can be used. None without an adapter."""
    quantized = config.quantization is not None
    if config.adapter is None:
        return None if adapter is None else adapter_settings(adapter, quantized=quantized)
    settings = cast(PeftConfig, PeftConfig.from_pretrained(config.adapter))
    settings.inference_mode = False
    check_adapter(settings, quantized=quantized)
    if changes_base(settings):
        raise ValueError(
            f"The adapter {config.adapter} belongs to a base that its initialisation has changed "
            f"(`init_lora_weights` is {vars(settings)['init_lora_weights']!r} in its adapter_config.json). Export it "
            "for the unchanged base, or merged, and continue from that."
        )
    return settings


def _add_adapter(model: PreTrainedModel, settings: PeftConfig) -> PeftModel:
    check_start(settings, model)
    policy = cast(PeftModel, get_peft_model(model, settings))
    check_start(settings, model)  # now it is known which layers are adapted
    if changes_base(settings):
        keep_initial_adapter(policy)
    return policy


def _continue_adapter(model: PreTrainedModel, path: str, settings: PeftConfig, *, reference: bool) -> PeftModel:
    weights = load_peft_weights(path, device="cpu")
    policy = _add_adapter(model, settings)
    if reference and not trains_base(policy):
        policy.add_adapter(REFERENCE_ADAPTER, plain_start(settings))
    for name in list(policy.peft_config):
        try:
            result: Any = set_peft_model_state_dict(policy, weights, adapter_name=name)
        except RuntimeError as error:
            raise ValueError(_foreign_adapter(path, model, str(error).splitlines()[-1].strip())) from error
        missing = [key for key in result.missing_keys if f".{name}." in key]
        if missing or result.unexpected_keys:
            strangers = ", ".join([*missing[:2], *result.unexpected_keys[:2]])
            raise ValueError(_foreign_adapter(path, model, f"keys without a partner: {strangers}"))
    policy.set_adapter("default")
    return policy


def _foreign_adapter(path: str, model: PreTrainedModel, detail: str) -> str:
    return (
        f"The adapter {path} was not made for {model.config.name_or_path}: {detail}. Set `policy.model` to the base "
        "named in its adapter_config.json."
    )
