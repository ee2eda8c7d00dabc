"""Semantic density: precision and recall of a reasoning trace against the reference solution.

Source: the "semantic density reward, derived from the precision-recall alignment between generated reasoning traces and
ground-truth solutions" of LambdaPO (arXiv 2605.19416). N-gram overlap and longest common subsequence as in ROUGE
(Lin 2004).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning_lambdapo.functional.token_weights import TokenWeights, heaviest_common_subsequence

Kind = Literal["token", "rouge_l"]

_TOKEN = re.compile(r"\\[A-Za-z]+|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]|_")
#: Marks of a final answer, before which the reasoning trace ends.
FINAL_ANSWER = ("####", "\\boxed{", "<answer>")


class SemanticDensityScore(NamedTuple):
    """Precision, recall and F of one trace, each in [0, 1]."""

    precision: float
    recall: float
    f: float


def tokenize(text: str) -> list[str]:
    r"""Split a text into LaTeX commands, numbers, words and symbols.

    Commas are removed from numbers. Everything but commands is lower-cased.

    Args:
        text: any text.

    Returns:
        Its tokens, in order, without white space.

    Example:
        >>> tokenize(r"She pays $1,200 = \frac{1}{2} x")
        ['she', 'pays', '$', '1200', '=', '\\frac', '{', '1', '}', '{', '2', '}', 'x']
    """
    # A token that starts with a comma is that symbol. Otherwise only numbers contain commas.
    return [token if token[0] in "\\," else token.replace(",", "").lower() for token in _TOKEN.findall(text)]


def reasoning_trace(text: str) -> str:
    r"""The text before the last final-answer marker (``####``, ``\boxed{``, ``<answer>``), or all of it without one.

    Args:
        text: a completion or a reference solution.

    Returns:
        The reasoning that leads to the answer.

    Example:
        >>> reasoning_trace("2 + 2 = 4\n#### 4")
        '2 + 2 = 4\n'
    """
    cut = max(text.rfind(marker) for marker in FINAL_ANSWER)
    return text if cut < 0 else text[:cut]


def semantic_density(
    generated: Sequence[str],
    reference: Sequence[str],
    *,
    kind: Kind = "rouge_l",
    n: int = 1,
    beta: float = 1.0,
    weights: TokenWeights | None = None,
) -> SemanticDensityScore:
    r"""Precision, recall and F of a generated token list against a reference token list.

    The overlap is the clipped n-gram overlap with ``kind="token"``, and the length of the longest common subsequence
    with ``"rouge_l"``. Divided by the trace's size it is the precision p, by the reference's size the recall r, and

    .. math:: F_\beta = \frac{(1 + \beta^2)\, p r}{\beta^2 p + r}

    With ``weights`` every token counts with its weight instead of 1: the size of a side is the sum of its tokens'
    weights, the overlap that of the tokens in common. ``"rouge_l"`` then takes the common subsequence of the largest
    total weight. An n-gram weighs as much as its tokens together.

    Args:
        generated: tokens of the trace.
        reference: tokens of the reference solution.
        kind: ``"token"`` or ``"rouge_l"``.
        n: length of the n-grams, 1 with ``"rouge_l"``.
        beta: weight of recall against precision, above 0.
        weights: how much each token counts, such as :meth:`TokenWeights.idf`. None counts each as 1.

    Returns:
        Precision, recall, F. All 0 where a side is empty or nothing of any weight overlaps.

    Raises:
        ValueError: unknown kind, ``n`` below 1 or not 1 with ``"rouge_l"``, beta that is not a finite number above 0.

    Example:
        >>> semantic_density(["a", "b", "c", "d"], ["a", "c"])
        SemanticDensityScore(precision=0.5, recall=1.0, f=0.6666666666666666)
        >>> semantic_density(["b", "a"], ["a", "b", "c", "a"], kind="token", n=2, beta=2.0)
        SemanticDensityScore(precision=0.0, recall=0.0, f=0.0)
        >>> weights = TokenWeights({"a": 3.0, "+": 0.0}, unseen=1.0)
        >>> semantic_density(["b", "+", "a"], ["a", "+", "c"], weights=weights)  # a is 3 of 4 on either side
        SemanticDensityScore(precision=0.75, recall=0.75, f=0.75)
    """
    check_density_settings(kind=kind, n=n, beta=beta)
    return _density_compute(*_density_update(generated, reference, kind=kind, n=n, weights=weights), beta=beta)


def check_density_settings(*, kind: Kind, n: int, beta: float) -> None:
    """Raise ``ValueError`` for settings that :func:`semantic_density` refuses."""
    if kind not in ("token", "rouge_l"):
        raise ValueError(f"`kind` must be one of token, rouge_l, got {kind!r}.")
    if n < 1 or (kind == "rouge_l" and n != 1):
        raise ValueError(f"`n` must be at least 1, and 1 with kind='rouge_l', got {n}. N-grams need kind='token'.")
    check_beta(beta)


def check_beta(beta: float) -> None:
    """Raise ``ValueError`` unless ``beta`` is a finite number above 0."""
    if not 0 < beta < math.inf:
        raise ValueError(f"`beta` must be a finite number above 0, got {beta}.")


def _density_update(
    generated: Sequence[str], reference: Sequence[str], *, kind: Kind, n: int, weights: TokenWeights | None = None
) -> tuple[float, float, float]:
    """Counts of one row: the overlap, the size of the trace, the size of the reference."""
    if kind == "rouge_l":
        if weights is not None:
            overlap = heaviest_common_subsequence(generated, reference, weights)
            return overlap, math.fsum(weights.of(generated)), math.fsum(weights.of(reference))
        from rapidfuzz.distance import LCSseq

        ids: dict[str, int] = {}  # rapidfuzz compares hashes, and those of "" and "\0" are equal
        numbered = [[ids.setdefault(token, len(ids)) for token in tokens] for tokens in (generated, reference)]
        return LCSseq.similarity(*numbered), len(generated), len(reference)
    ours, theirs = _ngrams(generated, n), _ngrams(reference, n)
    counts = ours & theirs, ours, theirs
    if weights is None:
        return counts[0].total(), counts[1].total(), counts[2].total()
    overlap, generated_size, reference_size = (
        math.fsum(count * sum(weights.of(ngram)) for ngram, count in each.items()) for each in counts
    )
    return overlap, generated_size, reference_size


def _density_compute(
    overlap: float, generated_size: float, reference_size: float, *, beta: float
) -> SemanticDensityScore:
    """Precision, recall and F from the counts of :func:`_density_update`."""
    if overlap == 0:
        return SemanticDensityScore(0.0, 0.0, 0.0)
    precision, recall = min(overlap / generated_size, 1.0), min(overlap / reference_size, 1.0)  # sums are rounded
    square = min(beta * beta, 1e300)  # F equals the recall long before that, and infinity / infinity is NaN
    f = (1 + square) * precision * recall / (square * precision + recall)
    return SemanticDensityScore(precision, recall, f)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    if n > len(tokens):
        return Counter()
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
