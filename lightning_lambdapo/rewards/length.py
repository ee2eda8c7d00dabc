"""A soft limit on the length of completions."""

from lightning_lambdapo.functional.ranges import check_whole
from lightning_lambdapo.rewards.base import Reward, RewardInputs


class LengthPenalty(Reward):
    r"""Soft penalty on overlong completions.

    With ``L`` the length in tokens, ``M`` the maximum and ``b`` the buffer:

    .. math:: R = 0 \text{ for } L \le M - b, \quad (M - b - L) / b \text{ for } M - b < L \le M, \quad -1 \text{ else}

    Args:
        max_length: ``M``, the length in tokens from which the penalty is full.
        buffer: ``b``, the number of tokens before it over which the penalty grows, 1 to ``max_length``.
        weight: coefficient in the total.
        name: key in logs.

    Raises:
        ValueError: a buffer out of range.

    Example:
        >>> inputs = RewardInputs(
        ...     prompts=["?"] * 3, completions=["..."] * 3, answers=[None] * 3, references=[None] * 3,
        ...     completion_lengths=[80, 95, 130], truncated=[False, False, True], columns=[{}] * 3)
        >>> LengthPenalty(max_length=100, buffer=20)(inputs)
        [0.0, -0.75, -1.0]

    Source: soft overlong punishment of DAPO, arXiv 2503.14476, equation 13.
    """

    def __init__(self, max_length: int, buffer: int, weight: float = 1.0, name: str = "length") -> None:
        super().__init__(weight, name)
        if not 1 <= buffer <= max_length:
            raise ValueError(f"`buffer` must be from 1 to `max_length` ({max_length}), got {buffer}.")
        check_whole("max_length", max_length, 1)
        check_whole("buffer", buffer, 1)
        self.max_length = max_length
        self.buffer = buffer

    def reads_token(self, token: str) -> bool:
        """It reads none."""
        return False

    def __call__(self, inputs: RewardInputs) -> list[float | None]:
        """Judge every row."""
        free = self.max_length - self.buffer
        return [-min(max(length - free, 0) / self.buffer, 1.0) + 0.0 for length in inputs.completion_lengths]
