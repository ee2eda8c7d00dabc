"""The tokens of a rollout in progress, in tensors that keep their address."""

from collections.abc import Sequence

import torch
from torch import Tensor


class LiveRows:
    """The tokens sampled so far, and the ``n`` rows still being decoded, in the order of the store.

    Every method but :meth:`add` and :meth:`select` only changes tensors in place and reads nothing back, so that a
    captured decoding step may call it. A row that has ended may continue decoding. What it draws is not recorded.

    Args:
        eos_ids: token ids that end a row.
        pad_id: id where nothing was recorded.
        shape: number of rows of the rollout, and most tokens of a completion.
        capacity: most rows that are live at a time.
        dtype: type of log-probabilities and entropies.
        device: where everything is stored.
    """

    def __init__(
        self,
        eos_ids: Sequence[int],
        pad_id: int,
        shape: tuple[int, int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        total, self.length = shape
        self.count = 0
        self.eos = torch.tensor(eos_ids, device=device)
        # What ended rows draw goes to the last column, which is cut off at the end.
        self._ids = torch.full((total, self.length + 1), pad_id, device=device)
        self._logprobs, self._entropy = (
            torch.zeros(total, self.length + 1, dtype=dtype, device=device) for _ in range(2)
        )
        self._state = [torch.zeros(capacity, dtype=torch.long, device=device) for _ in range(3)]
        self._state.append(torch.zeros(capacity, dtype=torch.bool, device=device))

    @property
    def rows(self) -> Tensor:
        """``(n,)`` int64, index of each row among all rows."""
        return self._state[0][: self.count]

    @property
    def steps(self) -> Tensor:
        """``(n,)`` int64, index of the token that each row samples next."""
        return self._state[1][: self.count]

    @property
    def tokens(self) -> Tensor:
        """``(n,)`` int64, the last token sampled."""
        return self._state[2][: self.count]

    @property
    def alive(self) -> Tensor:
        """``(n,)`` bool, False once a row has ended."""
        return self._state[3][: self.count]

    @property
    def recorded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int64, log-probabilities and entropies of all rows, each ``(total, length)``."""
        ids, logprobs, entropy = (values[:, : self.length] for values in (self._ids, self._logprobs, self._entropy))
        return ids, logprobs, entropy

    def add(self, rows: Tensor) -> slice:
        """Add new rows. Returns where their first tokens are to be written."""
        new = slice(self.count, self.count + len(rows))
        starts: tuple[Tensor | int | bool, ...] = rows, 0, 0, True
        for states, start in zip(self._state, starts, strict=True):
            states[new] = start
        self.count += len(rows)
        return new

    def write(self, which: slice, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
        """Record one token of each of these rows, with its log-probability and entropy, and note which rows end."""
        rows, steps, alive = self.rows[which], self.steps[which], self.alive[which]
        place = rows, torch.where(alive, steps, self.length)
        for target, values in zip((self._ids, self._logprobs, self._entropy), drawn, strict=True):
            target.index_put_(place, values)
        tokens = drawn[0]
        self.tokens[which] = tokens
        ends = (tokens[:, None] == self.eos).any(-1)
        alive &= ~ends & (steps < self.length - 1)
        steps.add_(1).clamp_(max=self.length - 1)

    def select(self, order: Tensor) -> None:
        """Keep the rows at these indices, in this order."""
        for states in self._state:
            states[: len(order)] = states[order]
        self.count = len(order)
