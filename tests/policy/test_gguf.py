"""A GGUF file as the policy: read as it is, and as the base of a 4-bit QLoRA."""

from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_lambdapo.config import AdapterConfig, PolicyConfig
from lightning_lambdapo.policy.loading import load_policy, load_tokenizer, save_policy

IDS = torch.tensor([[3, 9, 14, 22, 31]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


def test_weights_and_tokenizer_are_read(gguf_file: Path, tmp_path: Path) -> None:
    config = PolicyConfig(str(gguf_file))
    policy = load_policy(config, None)
    torch.testing.assert_close(logits(policy), logits(tiny.model("llama")))
    tokenizer = load_tokenizer(config)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 1
    assert tokenizer.bos_token_id == 2
    save_policy(policy, tokenizer, tmp_path / "export")  # transformers refuses models that remember a GGUF origin
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in again.state_dict().items())
    torch.testing.assert_close(logits(again), logits(policy), rtol=1e-5, atol=1e-5)


def test_a_4_bit_base_goes_by_way_of_the_cache(gguf_file: Path, tmp_path: Path) -> None:
    config = PolicyConfig(str(gguf_file), quantization="nf4")
    policy = load_policy(config, AdapterConfig(r=4))
    exact = logits(tiny.model("llama"))
    assert 0 < (logits(policy) - exact).abs().mean() < 0.5 * exact.std()
    cached = list((tmp_path / "cache").rglob("model.safetensors"))
    assert len(cached) == 1
    written = cached[0].stat().st_mtime_ns
    assert torch.equal(logits(load_policy(config, AdapterConfig(r=4))), logits(policy))
    assert cached[0].stat().st_mtime_ns == written
    assert not [path for path in (tmp_path / "cache").rglob("tmp*") if path.is_dir()]
