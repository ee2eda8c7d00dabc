import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from where import DEVICE

from lightning_lambdapo.policy import attention, causal
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


def assert_same(found: Tensor, expected: Tensor, states: list[Tensor]) -> None:
    """The same values, and the same gradients of query, key and value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * upstream).sum(), states),
        torch.autograd.grad((expected * upstream).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


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
    assert_same(found[0], expected, states)
    positions = [
        place
        for prompt, lengths in zip(prompts, completions, strict=True)
        for place in [*range(prompt), *(prompt + step for length in lengths for step in range(length))]
    ]
    assert row.position_ids.tolist() == [positions]


def states_of(total: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value of a row."""
    return [
        torch.randn(1, heads, total, SIZE, dtype=dtype, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize(("mask", "grouped"), [(True, True), (False, True), (False, False), (True, False)])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_every_kernel_and_rounded_shapes_give_the_same(
    monkeypatch: pytest.MonkeyPatch, multiple: int, mask: bool, grouped: bool, window: int | None, softcap: float | None
) -> None:
    """What CUDA would take, forced on this device: no mask, repeated heads, lengths rounded up."""
    needs_mask, sizes = causal.needs_mask, []
    monkeypatch.setattr(attention, "needs_mask", needs_mask if mask else lambda *_: False)
    monkeypatch.setattr(causal, "takes_grouped_heads", lambda *_: grouped)
    attend = attention._attend

    def observed(query: Tensor, key: Tensor, *arguments: Any) -> Tensor:
        sizes.extend([query.shape[1], key.shape[1]])
        return attend(query, key, *arguments)

    monkeypatch.setattr(attention, "_attend", observed)
    torch.manual_seed(1)
    prompts, completions = [5, 8, 7], [[3, 6, 1], [4, 4], []]
    states = states_of(sum(prompts) + sum(map(sum, completions)))
    row = PackedRow(prompts, completions, torch.device("cpu"), multiple)
    found = row.attend(states[0], states[1], states[2], Layer(0, 0.4, window, softcap))
    visible = visibility(prompts, completions, window)
    expected = dense(states[0], states[1], states[2], visible, scaling=0.4, softcap=softcap)
    assert_same(found[0], expected, states)
    assert not any(size % multiple for size in sizes)
    kept = len(row._masks)
    assert kept == 0 if not mask and window in (None, 100) and softcap is None else kept > 0
    row.release()
    assert not row._masks


def test_prompts_need_no_mask_anywhere() -> None:
    row = PackedRow([5, 2], [[], []], torch.device("cpu"))
    query, key, value = states_of(7)
    row.attend(query, key, value, Layer(0, 1.0, window=5))
    assert not row._masks
    row.attend(query, key, value, Layer(0, 1.0, window=4))
    assert list(row._masks) == [(0, 5, 4, torch.float64)]


@pytest.mark.parametrize(
    ("kind", "length", "keys", "mask"),
    [("cpu", 3, 3, False), ("cpu", 3, 5, True), ("cuda", 3, 5, False), ("cuda", 3, 3, False), ("mps", 3, 5, True)],
)
def test_where_a_mask_is_needed(kind: str, length: int, keys: int, mask: bool) -> None:
    assert causal.needs_mask(torch.device(kind), length, keys) == mask
    assert causal.bucket(torch.device(kind)) == (64 if kind == "cuda" else 1)


def test_an_amd_device_gets_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert causal.needs_mask(torch.device("cuda"), 3, 5)
    assert not causal.needs_mask(torch.device("cuda"), 5, 5)


def test_the_kernels_triangle_is_our_mask() -> None:
    """Position ``past + j`` sees the keys up to itself: exactly the lower right triangle."""
    for past, length in ((0, 4), (1, 1), (7, 3), (3, 7)):
        query, value = torch.zeros(1, 1, length, 2), torch.eye(past + length)[None, None]
        key = torch.zeros(1, 1, past + length, 2)
        weights = causal.causal_attention(query, key, value, None, 1.0)[0, 0]
        expected = torch.ones(length, past + length).tril(past)
        torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("maskless", [True, False])
@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, kind: str, maskless: bool) -> None:
    """Also where norms of queries and keys, but not of values, leave float32 under autocast."""
    if maskless:
        monkeypatch.setattr(attention, "needs_mask", lambda *_: False)
    torch.manual_seed(2)
    prompts, completions = [9, 4], [[3, 6], [2, 2, 5]]
    states = states_of(sum(prompts) + sum(map(sum, completions)), torch.bfloat16)
    row = PackedRow(prompts, completions, torch.device("cpu"), 4)
    exact = [each.detach().double() for each in states]
    visible = visibility(prompts, completions, None)
    expected = dense(exact[0], exact[1], exact[2], visible, scaling=0.4, softcap=None)
    query, key = (each.float() if kind == "autocast" else each for each in states[:2])
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = row.attend(query, key, states[2], Layer(0, 0.4))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=0.02)
    found.float().square().sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in states)


def test_the_models_own_attention_comes_back() -> None:
    model = tiny.model("llama")
    before = model.config._attn_implementation
    with branch_attention(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="on the way"), branch_attention(model):
        raise RuntimeError("on the way")
    assert model.config._attn_implementation == before
    ids = torch.arange(6, device=DEVICE)[None]
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
    row = PackedRow([4], [[]], DEVICE)
    with pytest.raises(UnsupportedAttentionError, match=message), branch_attention(model):
        model(torch.arange(4, device=DEVICE)[None], position_ids=row.position_ids, use_cache=False, branches=row)
