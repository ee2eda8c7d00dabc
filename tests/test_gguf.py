"""A GGUF file as the policy: read as it is, and as the base of a 4-bit QLoRA."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_lambdapo.config import AdapterConfig, PolicyConfig
from lightning_lambdapo.policy.loading import load_policy, load_tokenizer, save_policy

IDS = torch.tensor([[3, 9, 14, 22, 31]])
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave(weight: Tensor, heads: int) -> Tensor:
    """GGUF stores each head's query and key rows with the halves of the rotary embedding interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama as a GGUF file; the unpacking cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny.model("llama")
    config = model.config
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{index}>" for index in range(3)] + [chr(97 + index) for index in range(45)] + ["ab"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    tensors = {"token_embd.weight": model.get_input_embeddings().weight, "output_norm.weight": model.model.norm.weight}
    tensors["output.weight"] = model.lm_head.weight
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            block, _, rest = name.partition(".layers.")[2].partition(".")
            short = rest.removesuffix(".weight")
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            value = interleave(parameter, heads[short]) if short in heads else parameter
            tensors[f"blk.{block}.{NAMES[short]}.weight"] = value
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_weights_and_tokenizer_are_read(file: Path, tmp_path: Path) -> None:
    config = PolicyConfig(str(file))
    policy = load_policy(config, None)
    torch.testing.assert_close(logits(policy), logits(tiny.model("llama")))
    tokenizer = load_tokenizer(config)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 1
    save_policy(policy, tokenizer, tmp_path / "export")  # transformers refuses models that remember a GGUF origin
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export")), logits(policy))


def test_a_4_bit_base_goes_by_way_of_the_cache(file: Path, tmp_path: Path) -> None:
    config = PolicyConfig(str(file), quantization="nf4")
    policy = load_policy(config, AdapterConfig(r=4))
    exact = logits(tiny.model("llama"))
    assert 0 < (logits(policy) - exact).abs().mean() < 0.5 * exact.std()
    cached = list((tmp_path / "cache").rglob("model.safetensors"))
    assert len(cached) == 1
    written = cached[0].stat().st_mtime_ns
    assert torch.equal(logits(load_policy(config, AdapterConfig(r=4))), logits(policy))
    assert cached[0].stat().st_mtime_ns == written
    assert not [path for path in (tmp_path / "cache").rglob("tmp*") if path.is_dir()]
