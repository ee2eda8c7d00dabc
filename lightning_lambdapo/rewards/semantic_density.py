"""How much of the reference solution the reasoning trace covers, and how much of the trace it accounts for."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from lightning_lambdapo.functional.semantic_density import (
    Kind,
    check_density_settings,
    reasoning_trace,
    semantic_density,
    tokenize,
)
from lightning_lambdapo.rewards.base import Reward, RewardInputs

Measure = Literal["f", "precision", "recall"]


class SemanticDensityReward(Reward):
    """Precision-recall alignment of the reasoning trace with the reference solution, in [0, 1]; None without reference.

    Both texts are cut before their last final-answer marker and compared by
    :func:`~lightning_lambdapo.functional.semantic_density.semantic_density`.

    Args:
        weight: coefficient in the total.
        name: key in logs.
        kind: ``"rouge_l"`` (longest common subsequence) or ``"token"`` (clipped n-gram overlap).
        n: length of the n-grams; 1 with ``"rouge_l"``.
        beta: weight of recall against precision in F.
        measure: ``"f"``, ``"precision"`` or ``"recall"``.
        tokenizer: text to tokens, for both texts.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> inputs = RewardInputs(
        ...     prompts=["?"] * 2, completions=["a b c d #### 7"] * 2, answers=[None] * 2, references=["a c e", None],
        ...     completion_lengths=[6] * 2, truncated=[False] * 2, columns=[{}] * 2)
        >>> SemanticDensityReward(measure="precision")(inputs)
        [0.5, None]

    Source: LambdaPO, arXiv 2605.19416; ROUGE, Lin 2004.
    """

    requires = ("references",)

    def __init__(
        self,
        weight: float = 0.2,
        name: str = "semantic_density",
        kind: Kind = "rouge_l",
        n: int = 1,
        beta: float = 1.0,
        measure: Measure = "f",
        tokenizer: Callable[[str], Sequence[str]] = tokenize,
    ) -> None:
        super().__init__(weight, name)
        if measure not in get_args(Measure):
            raise ValueError(f"`measure` must be one of {', '.join(get_args(Measure))}; got {measure!r}.")
        check_density_settings(kind=kind, n=n, beta=beta)
        self.kind = kind
        self.n = n
        self.beta = beta
        self.measure = measure
        self.tokenizer = tokenizer

    def __call__(self, inputs: RewardInputs) -> list[float | None]:
        """Judge every row."""
        tokens = {text: self._tokens(text) for text in set(inputs.references) if text}
        return [
            self._density(self._tokens(completion), tokens[reference]) if reference else None
            for completion, reference in zip(inputs.completions, inputs.references, strict=True)
        ]

    def _tokens(self, text: str) -> Sequence[str]:
        return self.tokenizer(reasoning_trace(text))

    def _density(self, generated: Sequence[str], reference: Sequence[str]) -> float:
        density = semantic_density(generated, reference, kind=self.kind, n=self.n, beta=self.beta)
        return float(getattr(density, self.measure))
