"""The format reward: is the final answer where it was asked for?"""

import re
from collections.abc import Sequence
from typing import Literal

from lightning_lambdapo.rewards.answers import boxed_content
from lightning_lambdapo.rewards.base import Reward, RewardInputs

FormatStyle = Literal["boxed", "hash", "tag", "think"]

_MAX_LENGTH = 100_000
_PATTERNS = {
    "hash": r"^####[ \t]*\S",
    "tag": r"<answer>\s*\S.*?</answer>",
    "think": r"\A\s*(?:<think>)?(?:(?!</?think>).)*</think>\s*\S",
}


class FormatReward(Reward):
    r"""1 where the completion has the asked-for form exactly once, else 0.

    Styles: ``"boxed"``, a non-empty ``\boxed{...}``; ``"hash"``, a line ``#### answer``; ``"tag"``,
    ``<answer>...</answer>``; ``"think"``, a reasoning part that ends in ``</think>``, followed by an answer.

    Args:
        style: one of the above.
        pattern: a regular expression in its place (searched, with ``.`` matching newlines and ``^`` at every line).
        weight: coefficient in the total.
        name: key in logs.

    Raises:
        ValueError: unknown style, or a pattern that is no regular expression.
    """

    def __init__(
        self, style: FormatStyle = "boxed", pattern: str | None = None, weight: float = 1.0, name: str = "format"
    ) -> None:
        super().__init__(weight, name)
        if style != "boxed" and style not in _PATTERNS:
            raise ValueError(f"`style` must be one of boxed, {', '.join(_PATTERNS)}; got {style!r}.")
        self.style = style
        try:
            self._pattern = re.compile(pattern or _PATTERNS.get(style, r"\\boxed\{"), re.DOTALL | re.MULTILINE)
        except re.error as error:
            raise ValueError(f"`pattern` {pattern!r} is not a regular expression: {error}.") from error
        self._boxed = pattern is None and style == "boxed"

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        """Judge every row."""
        return [float(self._fits(text[-_MAX_LENGTH:])) for text in inputs.completions]

    def _fits(self, text: str) -> bool:
        if len(self._pattern.findall(text)) != 1:
            return False
        return not self._boxed or bool((boxed_content(text) or "").strip())
