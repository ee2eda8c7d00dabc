"""Building the policy and its frozen reference: any causal language model, LoRA, QLoRA, existing adapters."""

import copy
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_lambdapo.kernels import fast_linears
from lightning_lambdapo.parallel import unwrapped

Policy = PreTrainedModel | PeftModel

BUILTIN = "builtin:arithmetic"
_REFERENCE_ADAPTER = "reference"


@dataclass(frozen=True)
class PolicyConfig:
    """Where the policy comes from and how it is held in memory.

    Attributes:
        model: a hub id, a local directory, the path of a ``.gguf`` file, or ``builtin:arithmetic`` (the tiny policy
            of the quickstart).
        revision: branch, tag or commit of the hub repository.
        tokenizer: hub id or directory of the tokenizer, where it is not the model's own.
        adapter: hub id or directory of a PEFT adapter to continue training from; the reference is then that adapter.
        dtype: type of the base weights; adapters are float32 whatever the base is.
        quantization: hold the frozen base in 4 bits (``"nf4"``, ``"fp4"``) or 8 bits (``"int8"``) by bitsandbytes.
        double_quantization: quantise the 4-bit scales too.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        attn_implementation: transformers' name of the attention implementation; None lets transformers choose. It
            serves where prompts are not shared: the ``hf`` engine, padded rows.
        fused_lora: compute base and LoRA adapter of a linear layer as one operation.
        onednn: compute float32 linear layers on the CPU by oneDNN instead of torch's usual library (MKL); None does so
            on processors with AVX-512, which MKL leaves unused on AMD's.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    double_quantization: bool = True
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    fused_lora: bool = True
    onednn: bool | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("`policy.model` is empty; give a hub id, a directory or the path of a .gguf file.")
        if self.model.endswith(".gguf") and not Path(self.model).expanduser().is_file():
            raise ValueError(f"`policy.model` names a GGUF file that does not exist: {self.model}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return cast(torch.dtype, getattr(torch, self.dtype))


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter. Everything that peft's ``LoraConfig`` takes beyond the four usual settings goes to ``options``.

    Attributes:
        r: rank.
        alpha: the update is scaled by ``alpha / r``.
        dropout: dropout on the adapter's input while learning (never during rollouts).
        target_modules: ``"all-linear"``, a regular expression, or module name endings.
        options: further arguments of ``peft.LoraConfig``, such as ``use_dora``, ``use_rslora``, ``rank_pattern``.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)

    def to_peft(self) -> LoraConfig:
        """The same as a ``peft.LoraConfig`` for causal language models."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
            **self.options,
        )


def load_tokenizer(config: PolicyConfig) -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer, without its weights."""
    if config.tokenizer is not None:
        return AutoTokenizer.from_pretrained(config.tokenizer)
    location, options = locate(config)
    return AutoTokenizer.from_pretrained(location, **options)


def load_policy(
    config: PolicyConfig, adapter: AdapterConfig | PeftConfig | None, *, seed: int = 0, reference: bool = True
) -> Policy:
    """Build the policy, in eval mode: base weights frozen under an adapter, all weights trainable without one.

    Args:
        config: where the model comes from.
        adapter: the adapter to add; None with ``config.adapter`` unset fine-tunes all weights.
        seed: of the adapter's initial weights; the global random state is left alone.
        reference: keep a frozen copy of an adapter that is continued, for :func:`reference_mode`.

    Raises:
        ValueError: a quantised base without an adapter, or an adapter that was made for another base.
    """
    if adapter is not None and config.adapter is not None:
        raise ValueError(
            f"Both `lora` and `policy.adapter` ({config.adapter}) are set; an existing adapter brings its own "
            "settings, so set `lora: null` to continue from it."
        )
    if config.quantization and adapter is None and config.adapter is None:
        raise ValueError(
            f"`policy.quantization` is {config.quantization} and there is no adapter: quantised weights cannot be "
            "trained; set `lora`, or drop the quantization."
        )
    model = _load_base(config)
    _silence_dropout(model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if adapter is None and config.adapter is None:
        fast_linears(model, onednn=config.onednn)
        model.eval()
        return model
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.adapter is not None:
            policy = _continue_adapter(model, config.adapter, reference=reference)
        elif isinstance(adapter, AdapterConfig):
            policy = _add_adapter(model, adapter.to_peft())
        else:
            policy = _add_adapter(model, adapter)
    fast_linears(policy, fused_lora=config.fused_lora, onednn=config.onednn)
    policy.eval()
    return policy


def causal_lm(policy: Policy) -> PreTrainedModel:
    """The causal language model itself, adapter layers and all, without peft's or a strategy's outer wrapper."""
    return cast(PreTrainedModel, unwrapped(policy.get_base_model() if isinstance(policy, PeftModel) else policy))


def with_causal_lm(policy: Policy, model: nn.Module) -> Policy:
    """The policy with something else in the place of its causal language model."""
    if not isinstance(policy, PeftModel):
        return cast(Policy, model)
    policy.base_model.model = model
    return policy


def frozen_reference(policy: Policy) -> PreTrainedModel | None:
    """A frozen copy of a fully trained policy; None where switching the adapter gives the reference."""
    if isinstance(policy, PeftModel):
        return None
    return copy.deepcopy(policy).requires_grad_(False)


@contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Eval mode for the duration: in train mode with gradient checkpointing, decoding silently yields wrong tokens."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


@contextmanager
def reference_mode(policy: Policy) -> Iterator[None]:
    """Let an adapted policy answer as its reference: adapter off, or the adapter that training started from."""
    if not isinstance(policy, PeftModel):
        raise TypeError("A policy without adapter has no reference mode; score its frozen copy instead.")
    if _REFERENCE_ADAPTER not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    active = policy.active_adapter
    tuner = cast(BaseTuner, policy.base_model)
    tuner.set_adapter(_REFERENCE_ADAPTER, inference_mode=True)
    try:
        yield
    finally:
        tuner.set_adapter(active)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a completion: those of the generation config, the model's config and the tokenizer.

    Raises:
        ValueError: none of them names one.
    """
    ids: set[int] = set()
    for owner in (model.generation_config, model.config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        if value is not None:
            ids.update([value] if isinstance(value, int) else value)
    if not ids:
        raise ValueError(
            f"Neither the tokenizer nor the configuration of {model.config.name_or_path or type(model).__name__} names "
            "an end-of-sequence token, so no completion could ever end; set `eos_token` on the tokenizer."
        )
    return tuple(sorted(ids))


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the policy for ``from_pretrained``: the adapter alone where there is one, else the whole model.

    Args:
        policy: what to write.
        tokenizer: goes with it.
        directory: where to.
        weights: the policy's state dict, where its own tensors are shards; None takes its own.
    """
    if isinstance(policy, PeftModel):
        # The vocabulary is the base's; peft would look for the base on the hub to see whether it is.
        policy.save_pretrained(
            str(directory), selected_adapters=["default"], state_dict=weights, save_embedding_layers=False
        )
    else:
        _forget_gguf(policy)
        policy.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def locate(config: PolicyConfig) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is to be given for the base: hub id or directory, and further arguments."""
    if config.model == BUILTIN:
        return str(Path(__file__).parent / "quickstart" / "policy"), {}
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
        location = str(_unpack_gguf(Path(config.model).expanduser()))
    if config.quantization == "int8":
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
        # On CPUs with AVX512-BF16 an eval-mode forward would repack the 4-bit weights in place, lossily, into a form
        # whose kernel has no gradient: every later backward pass would be silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    return model


def _unpack_gguf(path: Path) -> Path:
    """Directory with the float32 weights of a GGUF file (transformers cannot quantise one while reading it)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning_lambdapo" / "gguf"
    target = cache / digest
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    _forget_gguf(model)
    scratch = Path(tempfile.mkdtemp(dir=cache))
    try:
        model.save_pretrained(scratch)
        scratch.rename(target)  # whole or not at all, also when several ranks unpack at once
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _forget_gguf(model: PreTrainedModel) -> None:
    """Weights read from a GGUF file are plain by now, but transformers refuses to save a model that remembers it."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer


def _silence_dropout(model: nn.Module) -> None:
    """The base never drops out: rollouts and learning must see one and the same policy."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _add_adapter(model: PreTrainedModel, settings: PeftConfig | None) -> PeftModel:
    return cast(PeftModel, get_peft_model(model, cast(PeftConfig, settings)))


def _continue_adapter(model: PreTrainedModel, path: str, *, reference: bool) -> PeftModel:
    settings = PeftConfig.from_pretrained(path)
    settings.inference_mode = False
    weights = load_peft_weights(path, device="cpu")
    policy = _add_adapter(model, settings)
    if reference:
        policy.add_adapter(_REFERENCE_ADAPTER, copy.deepcopy(settings))
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
