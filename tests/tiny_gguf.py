"""The tiny Llama as a GGUF file."""

from pathlib import Path

import gguf
import numpy as np
import tiny
from torch import Tensor

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


def write(path: Path) -> None:
    """Write the tiny Llama as a GGUF file."""
    model = tiny.model("llama")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
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
    writer.add_token_list(
        [f"<{index}>" for index in range(3)] + [chr(97 + index) for index in range(44)] + ["ab", "cd"]
    )
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(2)
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
