"""The semantic-density reward: the reasoning trace against the reference solution."""

from collections.abc import Callable, Sequence
from typing import Literal

from lightning_lambdapo.functional import reasoning_trace, semantic_density, tokenize
from lightning_lambdapo.functional.semantic_density import Kind, check_density_settings
from lightning_lambdapo.rewards.base import Reward, RewardInputs


class SemanticDensityReward(Reward):
    """F (or precision, or recall) of the reasoning trace against the reference; None without a reference.

    Both texts are cut before their last final-answer marker, so the reward is for the reasoning and not for the answer.

    Args:
        kind: ``"rouge_l"`` or ``"token"``; see :func:`~lightning_lambdapo.functional.semantic_density`.
        n: length of the n-grams of ``"token"``.
        beta: weight of recall against precision in F.
        measure: ``"f"``, ``"precision"`` or ``"recall"``.
        weight: coefficient in the total; the published one is not public, 0.2 is this package's choice.
        name: key in logs.
        tokenizer: text -> tokens, for both texts.
    """

    requires = ("references",)

    def __init__(
        self,
        kind: Kind = "rouge_l",
        n: int = 1,
        beta: float = 1.0,
        measure: Literal["f", "precision", "recall"] = "f",
        weight: float = 0.2,
        name: str = "semantic_density",
        tokenizer: Callable[[str], Sequence[str]] = tokenize,
    ) -> None:
        super().__init__(weight, name)
        check_density_settings(kind=kind, n=n, beta=beta)
        if measure not in ("f", "precision", "recall"):
            raise ValueError(f"`measure` must be one of f, precision, recall; got {measure!r}.")
        self.kind = kind
        self.n = n
        self.beta = beta
        self.measure = measure
        self.tokenizer = tokenizer

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        """Judge every row that has a reference."""
        tokens = {text: self._tokens(text) for text in {*inputs.references} if text is not None}
        return [
            None if reference is None else self._density(self._tokens(completion), tokens[reference])
            for completion, reference in zip(inputs.completions, inputs.references, strict=True)
        ]

    def _tokens(self, text: str) -> Sequence[str]:
        return self.tokenizer(reasoning_trace(text))

    def _density(self, generated: Sequence[str], reference: Sequence[str]) -> float:
        result = semantic_density(generated, reference, kind=self.kind, n=self.n, beta=self.beta)
        return float(getattr(result, self.measure))
