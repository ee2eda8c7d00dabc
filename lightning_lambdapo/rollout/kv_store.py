"""Keys and values of a rollout in progress: prompts are stored once, completions in preallocated blocks."""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_lambdapo.policy.attention import Branches, Layer, PackedRow, cap_scores

_BLOCK = 128


class GroupStore(Branches):
    """Live rows, each with the slot of its prompt. :meth:`attend` is one decoding step of all of them.

    Rows and prompts are stored without gaps: the last row replaces a removed one. Storage of completions grows in
    blocks of 128 tokens.

    Attributes:
        lengths: ``(n,)`` int64, number of stored tokens of each live row's completion.
        groups: ``(n,)`` int64, slot of each live row's prompt.
        prompt_lengths: ``(g,)`` int64.
    """

    def __init__(self, device: torch.device) -> None:
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self.groups = torch.zeros(0, dtype=torch.long, device=device)
        self.prompt_lengths = torch.zeros(0, dtype=torch.long, device=device)
        self._prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self._completions: dict[int, tuple[Tensor, Tensor]] = {}
        self._prompt_width = 0
        self._width = 0
        self._capacity = 0
        self._rows = self.lengths
        self._bias: dict[int | None, Tensor | None] = {}
        self._index: dict[int, tuple[Tensor, Tensor] | None] = {}

    def __len__(self) -> int:
        """Number of live rows."""
        return len(self.lengths)

    @property
    def position_ids(self) -> Tensor:
        """``(n, 1)`` int64, position of the token each row decodes next."""
        return (self.prompt_lengths[self.groups] + self.lengths)[:, None]

    def admit(self, prompt_lengths: Sequence[int], group_size: int) -> "Prefill":
        """Make room for prompts with ``group_size`` rows each. The model must then run with the returned prefill."""
        device, first = self.lengths.device, len(self.prompt_lengths)
        added = torch.tensor(prompt_lengths, device=device)
        slots = torch.arange(first, first + len(added), device=device).repeat_interleave(group_size)
        self.prompt_lengths = torch.cat([self.prompt_lengths, added])
        self._prompt_width = max(self._prompt_width, *prompt_lengths)
        self.groups = torch.cat([self.groups, slots])
        self.lengths = torch.cat([self.lengths, torch.zeros_like(slots)])
        self._rearranged()
        return Prefill(self, prompt_lengths, first)

    def write_prompts(self, layer: int, parts: list[tuple[Tensor, Tensor]], first: int) -> None:
        """Store keys and values ``(length, K, d)`` of the prompts whose slots begin at ``first``."""
        count = len(self.prompt_lengths)
        stored = self._prompts.get(layer)
        if stored is None or len(stored[0]) < count or stored[0].shape[2] < self._prompt_width:
            stored = self._prompts[layer] = _grown(stored, parts[0], count, self._prompt_width)
        for slot, states in enumerate(parts, start=first):
            for target, source in zip(stored, states, strict=True):
                target[slot, :, : len(source)] = source.transpose(0, 1)

    def begin_step(self) -> None:
        """Make room for one more token of each row. Call this before the model decodes it."""
        self._width = int(self.lengths.max()) + 1
        self._capacity = max(self._capacity, -(-self._width // _BLOCK) * _BLOCK)
        self._bias = {}

    def end_step(self) -> None:
        """Count the token that was decoded."""
        self.lengths = self.lengths + 1

    def keep(self, kept: Tensor) -> Tensor:
        """Remove the other rows.

        Args:
            kept: ``(n,)`` bool.

        Returns:
            ``(m,)`` int64, the old index of each row that stays.
        """
        count = int(kept.sum())
        order = torch.arange(count, device=kept.device)
        holes = (~kept[:count]).nonzero().squeeze(-1)
        movers = kept[count:].nonzero().squeeze(-1) + count
        order[holes] = movers
        if len(holes):
            for states in chain.from_iterable(self._completions.values()):
                stored = movers < len(states)  # rows added since the last step have nothing yet
                states[holes[stored], :, : self._width] = states[movers[stored], :, : self._width]
        self.lengths, self.groups = self.lengths[order], self.groups[order]
        self._drop_prompts()
        self._rearranged()
        return order

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """One decoding step: ``l`` is 1, ``b`` the number of live rows. See :meth:`Branches.attend`."""
        count, heads, _, dim = query.shape
        kv_heads = key.shape[1]
        repeats = heads // kv_heads
        keys, values = self._write(layer.number, key, value)
        prompt_keys, prompt_values = (
            states[: len(self.prompt_lengths)].flatten(0, 1) for states in self._prompts[layer.number]
        )
        query = (query * layer.scaling).view(count * kv_heads, repeats, dim)
        own = torch.bmm(query, keys.transpose(1, 2))
        shared = torch.bmm(self._by_prompt(query, kv_heads), prompt_keys.transpose(1, 2))
        scores = torch.cat([self._by_row(shared, kv_heads, repeats), own], dim=-1)
        scores = cap_scores(scores, layer.softcap)
        bias = self._bias_of(layer.window, prompt_keys.shape[1], scores.dtype)
        if bias is not None:
            scores.view(count, -1, scores.shape[-1]).add_(bias)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
        split = prompt_keys.shape[1]
        out = torch.bmm(weights[..., split:], values)
        shared = torch.bmm(self._by_prompt(weights[..., :split], kv_heads), prompt_values)
        out += self._by_row(shared, kv_heads, repeats)
        return out.view(count, 1, heads, -1)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new token. Returns keys and values ``(n * K, width, d)`` of completions, as views."""
        count = len(key)
        stored = self._completions.get(layer)
        if stored is None or len(stored[0]) < count or stored[0].shape[2] < self._capacity:
            stored = self._completions[layer] = _grown(stored, (key, value), count, self._capacity)
        for target, source in zip(stored, (key, value), strict=True):
            target[self._rows, :, self.lengths] = source[:, :, 0]
        keys, values = (states[:count, :, : self._width].flatten(0, 1) for states in stored)
        return keys, values

    def _bias_of(self, window: int | None, split: int, dtype: torch.dtype) -> Tensor | None:
        """Additive ``(n, 1, split + width)``: -inf where a row has no key, or the key is outside its window."""
        if window not in self._bias:
            device = self.lengths.device
            prompt = self.prompt_lengths[self.groups][:, None]
            own = self.lengths[:, None]
            place = torch.arange(split, device=device)
            later = torch.arange(self._width, device=device)
            hidden = torch.cat([place >= prompt, later > own], dim=-1)
            if window is not None:
                at = prompt + own
                hidden |= torch.cat([at - place >= window, own - later >= window], dim=-1)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
            self._bias[window] = bias[:, None] if bool(hidden.any()) else None
        return self._bias[window]

    def _by_prompt(self, rows: Tensor, kv_heads: int) -> Tensor:
        """``(n * K, r, x)`` to ``(g * K, s * r, x)``: rows of one prompt side by side."""
        index = self._indices(kv_heads)
        gathered = rows.index_select(0, index[0])
        return gathered.reshape(len(self.prompt_lengths) * kv_heads, -1, rows.shape[-1])

    def _by_row(self, grouped: Tensor, kv_heads: int, repeats: int) -> Tensor:
        """The inverse of :meth:`_by_prompt`."""
        flat = grouped.view(-1, repeats, grouped.shape[-1])
        return flat.index_select(0, self._indices(kv_heads)[1])

    def _indices(self, kv_heads: int) -> tuple[Tensor, Tensor]:
        """For each (prompt, head, place) a (row, head), and for each (row, head) its (prompt, head, place)."""
        found = self._index.get(kv_heads)
        if found is None:
            device, groups = self.groups.device, len(self.prompt_lengths)
            order = self.groups.argsort(stable=True)
            sizes = torch.bincount(self.groups, minlength=groups)
            places = int(sizes.max())
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order), device=device) - (sizes.cumsum(0) - sizes)[self.groups[order]]
            rows = torch.zeros(groups, places, dtype=torch.long, device=device)
            rows[self.groups, place] = self._rows
            head = torch.arange(kv_heads, device=device)
            there = (rows[:, None] * kv_heads + head[:, None]).flatten()
            back = ((self.groups[:, None] * kv_heads + head) * places + place[:, None]).flatten()
            found = self._index[kv_heads] = there, back
        return found

    def _drop_prompts(self) -> None:
        """Remove prompts without rows."""
        kept = torch.zeros(len(self.prompt_lengths), dtype=torch.bool, device=self.groups.device)
        kept[self.groups] = True
        order = kept.nonzero().squeeze(-1)
        if len(order) == len(kept):
            return
        renamed = torch.zeros(len(kept), dtype=torch.long, device=kept.device)
        renamed[order] = torch.arange(len(order), device=kept.device)
        self.groups, self.prompt_lengths = renamed[self.groups], self.prompt_lengths[order]
        for layer, stored in self._prompts.items():
            keys, values = (states[order] for states in stored)
            self._prompts[layer] = keys, values

    def _rearranged(self) -> None:
        self._rows = torch.arange(len(self.lengths), device=self.lengths.device)
        self._index = {}
        self._bias = {}


class Prefill(PackedRow):
    """Prompts end to end in one row. Their keys and values are written to the store during the pass."""

    def __init__(self, store: GroupStore, prompt_lengths: Sequence[int], first: int) -> None:
        super().__init__(prompt_lengths, [[]] * len(prompt_lengths), store.lengths.device)
        self.store = store
        self.first = first

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """Attention of one layer. See :meth:`Branches.attend`."""
        keys, values = (states[0].transpose(0, 1).split(self.prompts) for states in (key, value))
        self.store.write_prompts(layer.number, list(zip(keys, values, strict=True)), self.first)
        return super().attend(query, key, value, layer)


def _grown(
    old: tuple[Tensor, Tensor] | None, like: tuple[Tensor, Tensor], rows: int, width: int
) -> tuple[Tensor, Tensor]:
    """Storage of at least ``(rows, K, width, d)`` for states ``(..., K, ..., d)``, with the old content.

    The rest is 0, because a masked key must still be finite.
    """
    new: list[Tensor] = []
    for index, states in enumerate(like):
        before = states.new_empty(0, states.shape[1], 0, states.shape[-1]) if old is None else old[index]
        size = max(rows, before.shape[0]), max(width, before.shape[2])
        new.append(states.new_zeros(size[0], states.shape[1], size[1], states.shape[-1]))
        new[-1][: before.shape[0], :, : before.shape[2]] = before
    return new[0], new[1]
