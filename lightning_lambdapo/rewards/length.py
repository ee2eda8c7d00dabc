"""A soft penalty on overlong completions."""

from collections.abc import Sequence

from lightning_lambdapo.rewards.base import Reward, RewardInputs


class LengthPenalty(Reward):
    r"""Soft overlong punishment: 0 for short completions, then linearly down to -1.

    .. math:: 0 \text{ for } l \le L - b, \quad (L - b - l) / b \text{ for } L - b < l \le L, \quad -1 \text{ beyond}

    Source: DAPO, arXiv 2503.14476, equation 13.

    Args:
        max_length: L, tokens from which on the penalty is -1.
        buffer: b, tokens before that over which it grows; at most ``max_length``.
        weight: coefficient in the total.
        name: key in logs.

    Example:
        >>> penalty = LengthPenalty(max_length=100, buffer=20)
        >>> [penalty.of(length) for length in (80, 90, 100, 500)]
        [0.0, -0.5, -1.0, -1.0]
    """

    def __init__(self, max_length: int, buffer: int, weight: float = 1.0, name: str = "length") -> None:
        super().__init__(weight, name)
        if not 0 < buffer <= max_length:
            raise ValueError(f"`buffer` must be from 1 to `max_length` ({max_length}), got {buffer}.")
        self.max_length = max_length
        self.buffer = buffer

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        """Judge every row by its length in tokens."""
        return [self.of(length) for length in inputs.completion_lengths]

    def of(self, length: int) -> float:
        """Penalty of one completion of ``length`` tokens."""
        return min(0.0, max(-1.0, (self.max_length - self.buffer - length) / self.buffer))
