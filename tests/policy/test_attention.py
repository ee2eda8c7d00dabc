import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from lightning_lambdapo.policy.attention import Layer, PackedRow, UnsupportedAttentionError, branch_attention

HEADS, KV_HEADS, SIZE = 4, 2, 6


def dense(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, scaling: float, softcap: float | None
) -> Tensor:
    """One query at a time over the keys it sees, heads repeated: ``(l, H, d)``."""
    out = torch.zeros(query.shape[2], query.shape[1], value.shape[-1], dtype=query.dtype)
    for place in range(query.shape[2]):
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            scores = key[0, group, visible[place]] @ query[0, head, place] * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[place, head] = scores.softmax(-1) @ value[0, group, visible[place]]
    return out


def visibility(prompts: list[int], completions: list[list[int]], window: int | None) -> Tensor:
    """Token by token: the same prompt before it, or the same completion before it, within the window."""
    tokens = []
    for group, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        tokens += [(group, -1, place) for place in range(prompt)]
        tokens += [(group, branch, prompt + place) for branch, length in enumerate(lengths) for place in range(length)]
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, (group, branch, at) in enumerate(tokens):
        for j, (other, sibling, before) in enumerate(tokens):
            seen[i, j] = (
                group == other and sibling in (-1, branch) and before <= at and (window is None or at - before < window)
            )
    return seen


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(
    ("prompts", "completions"),
    [([5, 2, 7], [[3, 6, 1], [4, 4], []]), ([1], [[1]]), ([6], [[2, 5, 5, 3]])],
)
def test_packed_row_is_attention_under_its_mask(
    prompts: list[int], completions: list[list[int]], window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    total = sum(prompts) + sum(map(sum, completions))
    states = [
        torch.randn(1, heads, total, SIZE, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    row = PackedRow(prompts, completions, torch.device("cpu"))
    found = row.attend(states[0], states[1], states[2], Layer(0, 0.4, window, softcap))
    visible = visibility(prompts, completions, window)
    expected = dense(states[0], states[1], states[2], visible, scaling=0.4, softcap=softcap)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found[0] * upstream).sum(), states),
        torch.autograd.grad((expected * upstream).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    positions = [
        place
        for prompt, lengths in zip(prompts, completions, strict=True)
        for place in [*range(prompt), *(prompt + step for length in lengths for step in range(length))]
    ]
    assert row.position_ids.tolist() == [positions]


def test_the_models_own_attention_comes_back() -> None:
    model = tiny.model("llama")
    before = model.config._attn_implementation
    with branch_attention(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="on the way"), branch_attention(model):
        raise RuntimeError("on the way")
    assert model.config._attn_implementation == before
    ids = torch.arange(6)[None]
    assert math.isfinite(model(ids).logits.sum().item())


def test_layers_that_are_no_attention_are_refused() -> None:
    model = tiny.model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedAttentionError, match="layers of type linear_attention"), branch_attention(model):
        pass


@pytest.mark.parametrize(
    ("attribute", "value", "message"), [("sinks", torch.zeros(4), "sinks"), ("is_causal", False, "not causal")]
)
def test_attention_with_more_to_it_is_refused(attribute: str, value: Any, message: str) -> None:
    model = tiny.model("llama")
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            setattr(module, attribute, value)
    row = PackedRow([4], [[]], torch.device("cpu"))
    with pytest.raises(UnsupportedAttentionError, match=message), branch_attention(model):
        model(torch.arange(4)[None], position_ids=row.position_ids, use_cache=False, branches=row)
