"""Whether the completion has the form that was asked for."""

import re
from typing import Literal, get_args

from lightning_lambdapo.rewards.base import Reward, RewardInputs
from lightning_lambdapo.rewards.verifier.marks import count_boxes, iter_boxed, spoken

Style = Literal["boxed", "hash", "tag", "think_answer"]

_MAX_CHARACTERS = 100_000
_HASH_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*\S", re.MULTILINE)
_OPENED = re.compile(r"(<think>|<answer>|####|\\boxed\{)\s*\Z")
_MARKS = {
    "hash": ("####",),
    "tag": ("<answer>", "</answer>"),
    "think_answer": ("<think>", "</think>", "<answer>", "</answer>"),
}


class FormatReward(Reward):
    r"""1 where the completion gives its final answer in the asked-for form exactly once, else 0.

    ========================  =============================================================================
    ``style="boxed"``         one ``\boxed{...}``, braces balanced and not empty, or ``\boxed 9`` as LaTeX takes it
    ``style="hash"``          one ``####``, which starts a line and has something after it
    ``style="tag"``           one ``<answer>...</answer>``, not empty
    ``style="think_answer"``  nothing but ``<think>...</think>`` and then ``<answer>...</answer>``, neither empty
    ========================  =============================================================================

    The first three look only at what is said outside ``<think>...</think>``.

    Where a prompt ends with an opening mark, such as ``<think>`` in many chat templates, that mark and the completion
    may have the form together, and so may the completion alone.

    Args:
        weight: coefficient in the total.
        name: key in logs.
        style: the form.
        pattern: regular expression to search for instead of a ``style``. A completion of more than 100,000 characters
            gets 0 without a search. Make sure that the pattern is fast on shorter ones.

    Raises:
        ValueError: unknown style, or a pattern that does not compile.

    Example:
        >>> inputs = RewardInputs(
        ...     prompts=["?"] * 2, completions=["6 * 3 = 18\n#### 18", "18"], answers=[None] * 2, references=[None] * 2,
        ...     completion_lengths=[9, 1], truncated=[False] * 2, columns=[{}] * 2)
        >>> FormatReward(style="hash")(inputs)
        [1.0, 0.0]
        >>> FormatReward(pattern=r"\d+\Z")(inputs)
        [1.0, 1.0]
    """

    def __init__(
        self, weight: float = 1.0, name: str = "format", style: Style = "boxed", pattern: str | None = None
    ) -> None:
        super().__init__(weight, name)
        if style not in get_args(Style):
            raise ValueError(f"`style` must be one of {', '.join(get_args(Style))}, got {style!r}.")
        try:
            self.pattern = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`pattern` {pattern!r} is not a regular expression: {error}.") from error
        self.style = style

    def __call__(self, inputs: RewardInputs) -> list[float | None]:
        """Judge every row."""
        rows = zip(inputs.prompts, inputs.completions, strict=True)
        return [float(self._fits(completion) or self._fits_behind(prompt, completion)) for prompt, completion in rows]

    def reads_token(self, token: str) -> bool | None:
        """It reads the marks of its style, or the tokens that its pattern names."""
        if self.pattern is None:
            return token in _MARKS.get(self.style, ("\\boxed", "\\boxed{"))
        return token in self.pattern.pattern.replace("\\", "") or None

    def _fits_behind(self, prompt: str, completion: str) -> bool:
        """Whether prompt and completion have the form together, where the prompt ends with an opening mark."""
        opened = _OPENED.search(prompt)
        return opened is not None and self._fits(opened[0] + completion)

    def _fits(self, text: str) -> bool:
        if self.pattern is not None:
            return len(text) <= _MAX_CHARACTERS and self.pattern.search(text) is not None
        if self.style != "think_answer":
            text = spoken(text)
        if self.style == "boxed":
            return count_boxes(text) == 1 and any(content for _, content in iter_boxed(text))
        if any(text.count(mark) != 1 for mark in _MARKS[self.style]):
            return False
        if self.style == "hash":
            return _HASH_LINE.search(text) is not None
        if self.style == "tag":
            return _between(text, "<answer>", "</answer>")
        text = text.strip()
        gap = text[text.find("</think>") + len("</think>") : text.find("<answer>")]
        return (
            text.startswith("<think>")
            and text.endswith("</answer>")
            and not gap.strip()
            and text.find("</think>") < text.find("<answer>")
            and _between(text, "<think>", "</think>")
            and _between(text, "<answer>", "</answer>")
        )


def _between(text: str, opening: str, closing: str) -> bool:
    """Whether there is text between two marks."""
    return bool(text[text.find(opening) + len(opening) : text.find(closing)].strip())
