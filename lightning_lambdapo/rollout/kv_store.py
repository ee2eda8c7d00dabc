"""Keys and values of a rollout in progress: prompts are stored once, completions in storage of their final length."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lambdapo.policy.attention import Branches, Layer, PackedRow, cap_scores

_BLOCK = 128
_Pair = tuple[Tensor, Tensor]


class Shape(NamedTuple):
    """Sizes of one decoding step.

    Attributes:
        rows: rows that decode a token.
        width: tokens of completions that a row may attend to, its new one included.
        prompts: stored prompts.
        places: rows of a prompt, side by side.
        prompt_width: tokens of prompts that a row may attend to.
    """

    rows: int
    width: int
    prompts: int
    places: int
    prompt_width: int


class GroupStore(Branches):
    """Live rows, each with the slot of its prompt. :meth:`attend` is one decoding step of all of them.

    Rows and prompts are stored without gaps: the last row replaces a removed one. All storage keeps its address, and a
    decoding step changes it in place. What a step must know before it runs (how many rows there are, and how long they
    are) is known here without a look at the device: every row grows by one token a step.

    Args:
        device: where everything is stored.
        rows: most rows that are live at a time.
        length: most tokens of a completion. A row that continues regardless overwrites its last one.
        group_size: most rows of one prompt.
        prompt_width: most tokens of a prompt.
        rounded: round the sizes of a step up to few different ones. What that adds is masked.

    Attributes:
        shape: sizes of the step that :meth:`begin_step` began.
        version: changes when storage moves, which only a new prompt can make it do.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rows: int,
        length: int,
        group_size: int,
        prompt_width: int,
        rounded: bool = False,
    ) -> None:
        self.capacity, self.length, self.group_size, self.rounded = rows, length, group_size, rounded
        self.shape = Shape(0, 0, 0, 0, 0)
        self.version = 0
        self._width = prompt_width
        self._rows = torch.arange(rows, device=device)
        self._lengths, self._groups, self._prompt_lengths = (torch.zeros_like(self._rows) for _ in range(3))
        # The same on the host. `_steps` tokens were decoded since `_sizes` was written.
        self._sizes: list[int] = []
        self._slots: list[int] = []
        self._prompt_sizes: list[int] = []
        self._steps = 0
        self._prompt_slots = 0
        self._cleared = 0
        self._prompts: dict[int, _Pair] = {}
        self._completions: dict[int, _Pair] = {}
        self._index: dict[int, _Pair] = {}
        self._bias: dict[int | None, Tensor | None] = {}
        self._arranged: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Number of live rows."""
        return len(self._slots)

    @property
    def lengths(self) -> Tensor:
        """``(n,)`` int64, number of stored tokens of each live row's completion."""
        return self._lengths[: len(self)]

    @property
    def groups(self) -> Tensor:
        """``(n,)`` int64, slot of each live row's prompt."""
        return self._groups[: len(self)]

    @property
    def prompt_lengths(self) -> Tensor:
        """``(g,)`` int64."""
        return self._prompt_lengths[: len(self._prompt_sizes)]

    @property
    def position_ids(self) -> Tensor:
        """``(n, 1)`` int64, position of the token each row decodes next."""
        return (self._prompt_lengths[self.groups] + self.lengths)[:, None]

    @property
    def sizes(self) -> list[int]:
        """:attr:`lengths`, known without reading them."""
        return [min(size + self._steps, self.length - 1) for size in self._sizes]

    def held(self, kept: Sequence[bool]) -> tuple[int, int]:
        """Number of these rows, and tokens of their prompts together."""
        slots = [slot for slot, stays in zip(self._slots, kept, strict=True) if stays]
        return len(slots), sum(self._prompt_sizes[slot] for slot in set(slots))

    def admit(self, prompt_lengths: Sequence[int], group_size: int) -> "Prefill":
        """Make room for prompts with ``group_size`` rows each. The model must then run with the returned prefill."""
        first, start = len(self._prompt_sizes), len(self)
        self._sizes = [*self.sizes, *[0] * (len(prompt_lengths) * group_size)]
        self._prompt_sizes += prompt_lengths
        count = len(self._prompt_sizes)
        self._slots += [slot for slot in range(first, count) for _ in range(group_size)]
        if count > self._prompt_slots:
            self._prompt_slots = max(count, min(2 * self._prompt_slots, self.capacity))
            self.version += 1
        for states in chain.from_iterable(self._completions.values()):
            states[start : len(self), :, : self._cleared].zero_()  # what earlier rows left may not be finite
        self._rearranged()
        return Prefill(self, prompt_lengths, first)

    def write_prompts(self, layer: int, parts: list[_Pair], first: int) -> None:
        """Store keys and values ``(length, K, d)`` of the prompts whose slots begin at ``first``."""
        stored = self._prompts.get(layer)
        if stored is None or len(stored[0]) < self._prompt_slots:
            grown = _storage(parts[0], self._prompt_slots, self._width)
            for target, source in zip(grown, stored or (), strict=False):
                target[: len(source)] = source
            stored = self._prompts[layer] = grown
        for slot, pair in enumerate(parts, start=first):
            for target, source in zip(stored, pair, strict=True):
                target[slot, :, : len(source)] = source.transpose(0, 1)
                target[slot, :, len(source) :] = 0  # a masked key must still be finite
        if layer not in self._completions:
            self._completions[layer] = made = _storage(parts[0], self.capacity, self.length)
            for states in made:
                states[: len(self), :, : self._cleared].zero_()
        kv_heads = parts[0][0].shape[1]
        if kv_heads not in self._index:
            sizes = self.capacity * self.group_size * kv_heads, self.capacity * kv_heads
            there, back = (self._rows.new_zeros(size) for size in sizes)
            self._index[kv_heads] = there, back
            self._arranged = None

    def begin_step(self) -> None:
        """Make room for one more token of each row, which the model must then decode. The host's part of a step."""
        sizes = min(self._shortest + self._steps, self.length - 1), min(self._longest + self._steps, self.length - 1)
        exact = Shape(len(self), sizes[1] + 1, len(self._prompt_sizes), self._most, max(self._prompt_sizes))
        self.shape = self._round(exact) if self.rounded else exact
        self._ragged = self.rounded or sizes[0] < sizes[1] or min(self._prompt_sizes) < self.shape.prompt_width
        self._furthest = self._last + self._steps
        if self.shape.width > self._cleared:
            block = min(-(-self.shape.width // _BLOCK) * _BLOCK, self.length)
            for states in chain.from_iterable(self._completions.values()):
                states[: len(self), :, self._cleared : block].zero_()
            self._cleared = block
        self._bias = {}
        self._arrange()
        self._steps += 1

    def end_step(self) -> None:
        """Count the token that was decoded. The device's part of a step."""
        self.lengths.add_(1).clamp_(max=self.length - 1)

    def rounded_up(self, kept: list[bool], coming: int) -> list[bool]:
        """Rows to keep so that their number is a round one with the ``coming`` ones: some that have ended, too.

        A row is kept only if that makes no step wider and keeps no prompt longer.
        """
        count = sum(kept)
        if not self.rounded or not count:
            return kept
        free = min(_bucket(count + coming), self.capacity) - count - coming
        sizes, slots = self.sizes, {slot for slot, stays in zip(self._slots, kept, strict=True) if stays}
        longest = max(size for size, stays in zip(sizes, kept, strict=True) if stays)
        kept = list(kept)
        for row, (size, slot) in enumerate(zip(sizes, self._slots, strict=True)):
            if free > 0 and not kept[row] and slot in slots and size <= longest:
                kept[row] = True
                free -= 1
        return kept

    def keep(self, kept: Sequence[bool]) -> Tensor:
        """Remove the other rows, and prompts without rows.

        Args:
            kept: one per live row.

        Returns:
            ``(m,)`` int64, the old index of each row that stays.
        """
        order, moved = self._closed_up(kept)
        if moved is not None:
            for states in chain.from_iterable(self._completions.values()):
                states[moved[0], :, : self._cleared] = states[moved[1], :, : self._cleared]
        sizes, self._slots = self.sizes, [self._slots[row] for row in order]
        self._sizes = [sizes[row] for row in order]
        used = set(self._slots)
        if len(used) < len(self._prompt_sizes):
            places, moved = self._closed_up([slot in used for slot in range(len(self._prompt_sizes))])
            if moved is not None:
                for states in chain.from_iterable(self._prompts.values()):
                    states[moved[0]] = states[moved[1]]
            renamed = {slot: place for place, slot in enumerate(places)}
            self._slots = [renamed[slot] for slot in self._slots]
            self._prompt_sizes = [self._prompt_sizes[slot] for slot in places]
        self._rearranged()
        return torch.tensor(order, dtype=torch.long, device=self._rows.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """One decoding step: ``l`` is 1, ``b`` the number of live rows. See :meth:`Branches.attend`."""
        count, heads, _, dim = query.shape
        kv_heads = key.shape[1]
        repeats = heads // kv_heads
        keys, values = self._write(layer.number, key, value)
        split = self.shape.prompt_width
        prompt_keys, prompt_values = (
            states[: self.shape.prompts, :, :split].flatten(0, 1) for states in self._prompts[layer.number]
        )
        query = (query * layer.scaling).view(count * kv_heads, repeats, dim)
        own = torch.bmm(query, keys.transpose(1, 2))
        shared = torch.bmm(self._by_prompt(query, kv_heads), prompt_keys.transpose(1, 2))
        scores = torch.cat([self._by_row(shared, kv_heads, repeats), own], dim=-1)
        scores = cap_scores(scores, layer.softcap)
        bias = self._bias_of(layer.window, scores.dtype)
        if bias is not None:
            scores.view(count, -1, scores.shape[-1]).add_(bias)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
        out = torch.bmm(weights[..., split:], values)
        shared = torch.bmm(self._by_prompt(weights[..., :split], kv_heads), prompt_values)
        out += self._by_row(shared, kv_heads, repeats)
        return out.view(count, 1, heads, -1)

    def _round(self, exact: Shape) -> Shape:
        width = min(_bucket(-(-exact.width // _BLOCK)) * _BLOCK, self.length)
        prompts = min(_bucket(exact.prompts), self._prompt_slots)
        return Shape(exact.rows, width, prompts, self.group_size, self._width)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> _Pair:
        """Store the new token. Returns keys and values ``(n * K, width, d)`` of completions, as views."""
        count, width = self.shape[:2]
        stored = self._completions[layer]
        for target, source in zip(stored, (key, value), strict=True):
            target[self._rows[:count], :, self.lengths] = source[:, :, 0]
        keys, values = (states[:count, :, :width].flatten(0, 1) for states in stored)
        return keys, values

    def _bias_of(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive ``(n, 1, split + width)``: -inf where a row has no key, or the key is outside its window."""
        if window not in self._bias:
            if not self._ragged and (window is None or self._furthest < window):
                self._bias[window] = None
                return None
            device = self._rows.device
            prompt = self._prompt_lengths[self.groups][:, None]
            own = self.lengths[:, None]
            place = torch.arange(self.shape.prompt_width, device=device)
            later = torch.arange(self.shape.width, device=device)
            hidden = torch.cat([place >= prompt, later > own], dim=-1)
            if window is not None:
                at = prompt + own
                hidden |= torch.cat([at - place >= window, own - later >= window], dim=-1)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
            self._bias[window] = bias[:, None]
        return self._bias[window]

    def _by_prompt(self, rows: Tensor, kv_heads: int) -> Tensor:
        """``(n * K, r, x)`` to ``(g * K, s * r, x)``: rows of one prompt side by side."""
        count = self.shape.prompts * kv_heads
        gathered = rows.index_select(0, self._index[kv_heads][0][: count * self.shape.places])
        return gathered.reshape(count, -1, rows.shape[-1])

    def _by_row(self, grouped: Tensor, kv_heads: int, repeats: int) -> Tensor:
        """The inverse of :meth:`_by_prompt`."""
        flat = grouped.view(-1, repeats, grouped.shape[-1])
        return flat.index_select(0, self._index[kv_heads][1][: self.shape.rows * kv_heads])

    def _arrange(self) -> None:
        """For each (prompt, head, place) a (row, head), and for each (row, head) its (prompt, head, place)."""
        count, _, prompts, places, _ = self.shape
        if self._arranged == (prompts, places):
            return
        groups, place = self.groups, torch.tensor(self._places, device=self._rows.device)
        rows = self._rows.new_zeros(prompts, places)
        rows[groups, place] = self._rows[:count]
        for kv_heads, (there, back) in self._index.items():
            head = torch.arange(kv_heads, device=rows.device)
            there[: rows.numel() * kv_heads] = (rows[:, None] * kv_heads + head[:, None]).flatten()
            back[: count * kv_heads] = ((groups[:, None] * kv_heads + head) * places + place[:, None]).flatten()
        self._arranged = prompts, places

    def _closed_up(self, kept: Sequence[bool]) -> tuple[list[int], _Pair | None]:
        """Where each one that stays was, and, if some move, their new places and their old ones."""
        stay = [place for place, stays in enumerate(kept) if stays]
        order = list(range(len(stay)))
        holes = [place for place in order if not kept[place]]
        movers = stay[len(stay) - len(holes) :]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        device = self._rows.device
        return order, (torch.tensor(holes, device=device), torch.tensor(movers, device=device)) if holes else None

    def _rearranged(self) -> None:
        """Write down which rows and prompts there are now."""
        self._steps = 0
        for target, source in (
            (self._lengths, self._sizes),
            (self._groups, self._slots),
            (self._prompt_lengths, self._prompt_sizes),
        ):
            target[: len(source)] = torch.tensor(source, dtype=torch.long)
        filled = [0] * len(self._prompt_sizes)
        self._places = []
        for slot in self._slots:
            self._places.append(filled[slot])
            filled[slot] += 1
        self._most = max(filled, default=0)
        self._shortest, self._longest = min(self._sizes, default=0), max(self._sizes, default=0)
        ends = (size + self._prompt_sizes[slot] for size, slot in zip(self._sizes, self._slots, strict=True))
        self._last = max(ends, default=0)
        self._arranged = None


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


def _storage(like: _Pair, rows: int, width: int) -> _Pair:
    """Uninitialised ``(rows, K, width, d)`` for keys and values ``(..., K, d)``."""
    keys, values = (states.new_empty(rows, states.shape[1], width, states.shape[2]) for states in like)
    return keys, values


def _bucket(count: int) -> int:
    """The next number of which only the two leading binary digits are not 0: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    step = 1 << max(0, (count - 1).bit_length() - 2)
    return -(-count // step) * step
