"""A small random model that vLLM's CPU kernels can serve."""

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def write_model(directory: Path, **settings: Any) -> str:
    """A small random Llama with heads of the size that vLLM's CPU kernels have, and its tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": 49,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(sizes | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return str(directory)
