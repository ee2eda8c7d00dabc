"""Attention for rows that branch off shared prompts, as a function that transformers' models call.

A model uses it inside :func:`branch_attention`. The extra forward keyword ``branches`` says who attends to whom. No
mask of (tokens x tokens) exists, and no key of a prompt is stored twice. Where the device has a causal kernel, no mask
exists at all, unless a window or a softcap needs one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lightning_lambdapo.policy.causal import bucket, causal_attention, needs_mask

_NAME = "lambdapo_branches"


class UnsupportedAttentionError(RuntimeError):
    """The model's attention has a feature that branches do not support."""


class Layer(NamedTuple):
    """The attention settings of one layer.

    Attributes:
        number: the layer's index in the model.
        scaling: factor of the attention scores.
        window: a position attends to keys less than this far back. None attends to all.
        softcap: attention scores become ``softcap * tanh(score / softcap)``. None does not cap.
    """

    number: int
    scaling: float
    window: int | None = None
    softcap: float | None = None


class Branches(ABC):
    """Who attends to whom in one forward pass of the model. Passed as the keyword ``branches``."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """Attention of one layer.

        Args:
            query: ``(b, H, l, d)``, rotated.
            key: ``(b, K, l, d)`` of the same tokens. ``H`` is a multiple of ``K``.
            value: ``(b, K, l, e)``.
            layer: its index and settings.

        Returns:
            ``(b, l, H, e)``.
        """


@contextmanager
def branch_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` attend by the ``branches`` keyword inside this context.

    A backward pass that recomputes activations must be inside too.

    Raises:
        UnsupportedAttentionError: the configuration names layers other than attention over earlier tokens.
    """
    config = model.config
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedAttentionError(f"layers of type {', '.join(sorted(kinds))}")
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


class PackedRow(Branches):
    """One unpadded row of ``prompt, completion, completion, ..., prompt, completion, ...``: learning and prefill.

    Each prompt attends to itself. Each completion, padded to the longest of its group, attends to its prompt and
    itself. No other pair is computed, but for what rounding lengths up adds.

    Args:
        prompts: length of each prompt.
        completions: for each prompt, the lengths of its completions. May be empty.
        device: device of the row.
        multiple: numbers of queries and keys are rounded up to a multiple of this inside the attention, which changes
            no result. None is that of :func:`bucket`.
    """

    def __init__(
        self,
        prompts: Sequence[int],
        completions: Sequence[Sequence[int]],
        device: torch.device,
        multiple: int | None = None,
    ) -> None:
        self.prompts = list(prompts)
        self.completions = [list(lengths) for lengths in completions]
        self.device = device
        self._multiple = bucket(device) if multiple is None else multiple
        self._segments = [size for p, c in zip(self.prompts, self.completions, strict=True) for size in (p, sum(c))]
        self._padding = [
            _Padding.of(lengths, prompt, self._multiple, device)
            for prompt, lengths in zip(self.prompts, self.completions, strict=True)
        ]
        self._masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}

    @property
    def position_ids(self) -> Tensor:
        """``(1, l)`` int64: each completion continues from its prompt's length."""
        parts = []
        for prompt, lengths in zip(self.prompts, self.completions, strict=True):
            parts += [torch.arange(prompt), *(torch.arange(prompt, prompt + length) for length in lengths)]
        return torch.cat(parts)[None].to(self.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """Attention of one layer. See :meth:`Branches.attend`."""
        parts = [states[0].transpose(0, 1).split(self._segments) for states in (query, key, value)]
        out: list[Tensor] = []
        for index, (prompt, padding) in enumerate(zip(self.prompts, self._padding, strict=True)):
            prompt_q, prompt_k, prompt_v = (part[2 * index] for part in parts)
            extra = -prompt % self._multiple  # later positions, to which no real one attends
            q, k, v = (
                nn.functional.pad(states, (0, 0, 0, 0, 0, extra))[None] for states in (prompt_q, prompt_k, prompt_v)
            )
            out.append(_attend(q, k, v, self._mask(0, q.shape[1], layer, q.dtype), layer)[0, :prompt])
            if padding is None:
                continue
            q, k, v = (padding.pad(part[2 * index + 1]) for part in parts)
            # The prompt's last queries come along to a round number, and are dropped.
            again = prompt % self._multiple
            q, k, v = (
                torch.cat([shared.expand(len(own), *shared.shape), own], dim=1) if len(shared) else own
                for shared, own in ((prompt_q[prompt - again :], q), (prompt_k, k), (prompt_v, v))
            )
            attended = _attend(q, k, v, self._mask(prompt - again, q.shape[1], layer, q.dtype), layer)
            out.append(padding.unpad(attended[:, again:]))
        return torch.cat(out)[None]

    def release(self) -> None:
        """Free the masks. Call this when the row has been through its last pass."""
        self._masks.clear()

    def _mask(self, past: int, length: int, layer: Layer, dtype: torch.dtype) -> Tensor | None:
        """Additive ``(length, past + length)``: position ``past + j`` attends to keys up to itself, within its window.

        None if the kernel needs no mask for that. Padding comes after every real position of its row, so no real
        position attends to it.
        """
        window = None if layer.window is not None and layer.window >= past + length else layer.window
        if window is None and layer.softcap is None and not needs_mask(self.device, length, past + length):
            return None
        name = (past, length, window, dtype)
        if name not in self._masks:
            distance = torch.arange(past, past + length, device=self.device)[:, None] - torch.arange(
                past + length, device=self.device
            )
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            self._masks[name] = torch.zeros(distance.shape, dtype=dtype, device=self.device).masked_fill_(
                hidden, -math.inf
            )
        return self._masks[name]


class _Padding:
    """Converts rows of unequal length between ``(sum of lengths, ...)`` and ``(rows, width, ...)``.

    The width is that of the longest row. It is rounded up until ``past`` earlier positions and the row together are a
    multiple of ``multiple``.
    """

    def __init__(self, lengths: Sequence[int], past: int, multiple: int, device: torch.device) -> None:
        longest = max(lengths)
        self.shape = len(lengths), longest + -(past + longest) % multiple
        self.index: Tensor | None = None
        if set(lengths) != {self.shape[1]}:
            size = torch.tensor(lengths)
            place = torch.arange(self.shape[1]).expand(self.shape)
            mask = place < size[:, None]
            start = (size.cumsum(0) - size)[:, None]
            self.index = (start + place.minimum(size[:, None] - 1)).flatten().to(device)
            self.kept = mask.flatten().nonzero().squeeze(-1).to(device)

    @classmethod
    def of(cls, lengths: Sequence[int], past: int, multiple: int, device: torch.device) -> "_Padding | None":
        return cls(lengths, past, multiple, device) if lengths else None

    def pad(self, flat: Tensor) -> Tensor:
        return (flat if self.index is None else flat.index_select(0, self.index)).view(*self.shape, *flat.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.kept)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layer: Layer) -> Tensor:
    """Plain attention of ``(b, l, H, d)`` over ``(b, m, K, d)`` under an additive ``(l, m)`` mask, or causal."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    if layer.softcap is None:
        return causal_attention(query, key, value, mask, layer.scaling).transpose(1, 2)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = cap_scores(query @ key.transpose(-1, -2) * layer.scaling, layer.softcap)
    scores = scores if mask is None else scores + mask
    out = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value
    return out.transpose(1, 2)


def cap_scores(scores: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(scores / softcap)``, or ``scores`` without a cap."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    branches: Branches,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer. See :class:`Branches`."""
    unknown = [name for name in ("s_aux", "sinks", "position_bias", "alibi") if others.get(name) is not None]
    if unknown or getattr(module, "sinks", None) is not None:
        raise UnsupportedAttentionError(f"attention with {unknown[0] if unknown else 'sinks'}")
    if not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError("attention that is not causal")
    layer = Layer(
        number=getattr(module, "layer_idx"),  # noqa: B009
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window if sliding_window is not None else getattr(module, "sliding_window", None),
        softcap=softcap,
    )
    return branches.attend(query, key, value, layer), None


AttentionInterface.register(_NAME, _attention_function)
