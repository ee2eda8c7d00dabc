"""Tiny random models of several architectures, a character tokenizer, and batches to feed them."""

import dataclasses
import random
from types import MethodType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from where import DEVICE

from lightning_lambdapo.config import PerformanceConfig, RolloutConfig
from lightning_lambdapo.datatypes import PromptBatch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+-=,.;# ()"


def tokenizer(*, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    pad = "<eos>" if pad_is_eos else "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token="<eos>", unk_token="<unk>")


def config(architecture: str, vocab_size: int = 49) -> PretrainedConfig:
    """A two-layer configuration; GPT-2 has learned positions, Gemma3 and Mistral sliding windows."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if architecture == "llama":
        return LlamaConfig(**sizes)
    if architecture == "qwen3":
        return Qwen3Config(**sizes, head_dim=8, tie_word_embeddings=True)
    if architecture == "phi3":
        return Phi3Config(**sizes)
    if architecture == "mistral":
        return MistralConfig(**sizes, sliding_window=6)
    if architecture == "gemma3":
        return Gemma3TextConfig(
            **sizes,
            head_dim=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
        )
    return GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=1
    )


def model(architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model; its initial weights are large enough for distributions that are far from uniform."""
    torch.manual_seed(seed)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config(architecture)).to(device=DEVICE, dtype=dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    if dtype == torch.float64:
        for module in built.modules():
            if type(module).__name__.endswith("RMSNorm"):
                # transformers' norms round to float32 on the way, and do so with gradients too.
                module.forward = MethodType(_exact_rms_norm, module)
    built.eval()
    return built


def _exact_rms_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    gemma = "Gemma" in type(self).__name__
    eps = self.eps if gemma else self.variance_epsilon
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    scaled: torch.Tensor = normed * (1 + self.weight if gemma else self.weight)
    return scaled


def adapted(
    architecture: str = "llama", *, dtype: torch.dtype = torch.float32, scale: float = 0.3, **options: Any
) -> PeftModel:
    """A model with LoRA whose adapter does something (its B starts at 0), in eval mode."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    built = cast(PeftModel, get_peft_model(model(architecture, dtype=dtype), LoraConfig(**(settings | options))))
    shake(built, scale)
    return built.eval()


def shake(policy: Any, scale: float) -> None:
    """Give the adapter's B random values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def randomise(policy: Any, seed: int = 0) -> None:
    """Give every adapter matrix of the trained adapter a random value (LoRA's B starts at 0)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name and ".default" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def configured(**settings: Any) -> dict[str, Any]:
    """Arguments of the grouped engine from the settings of both its configurations."""
    switches = {field.name for field in dataclasses.fields(PerformanceConfig)}
    performance = {name: value for name, value in settings.items() if name in switches}
    config = {name: value for name, value in settings.items() if name not in switches}
    return {"config": RolloutConfig(**config), "performance": PerformanceConfig(**performance)}


def batch(
    prompts: list[list[int]], *, prompt_ids: list[int] | None = None, pad_id: int = 0, extra: int = 0
) -> PromptBatch:
    """Left-padded token prompts, ``extra`` columns wider than needed."""
    width = max(map(len, prompts)) + extra
    return PromptBatch(
        input_ids=torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=DEVICE),
        attention_mask=torch.tensor(
            [[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts], device=DEVICE
        ),
        prompt_ids=torch.tensor(prompt_ids or list(range(len(prompts))), device=DEVICE),
        prompts=[" ".join(map(str, ids)) for ids in prompts],
        answers=["7" for _ in prompts],
        references=["a + b = 7" for _ in prompts],
        columns=[{} for _ in prompts],
    )


def ragged_prompts(count: int, *, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Random prompts of different lengths, without special tokens."""
    source = random.Random(seed)
    return [[source.randrange(3, 49) for _ in range(source.randint(1, longest))] for _ in range(count)]
