"""How much each token counts in a semantic density, from how many reference solutions have it."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class TokenWeights:
    """A weight for each token, and one for tokens that are not in the table.

    Args:
        weights: token -> weight, a finite number, at least 0.
        unseen: weight of every other token.

    Raises:
        ValueError: a weight that is negative or not finite.

    Example:
        >>> weights = TokenWeights({"+": 0.0, "7": 1.5}, unseen=2.0)
        >>> weights.of(["7", "+", "8"])
        [1.5, 0.0, 2.0]
    """

    weights: Mapping[Any, float]
    unseen: float

    def __post_init__(self) -> None:
        for token, weight in (*self.weights.items(), ("(unseen)", self.unseen)):
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"The weight of a token must be a finite number, at least 0, and {token!r} has {weight}."
                )

    @classmethod
    def idf(cls, documents: Iterable[Iterable[Hashable]]) -> Self:
        r"""Inverse document frequency: what many documents have counts little, what few have counts much.

        .. math:: w(t) = \log \frac{N + 1}{\mathrm{df}(t) + 1}

        for ``N`` documents, of which :math:`\mathrm{df}(t)` contain the token at least once. A token that all documents
        contain has the weight 0, one that none contains :math:`\log(N + 1)`. The order of the documents has no effect.

        Args:
            documents: the tokens of each document.

        Raises:
            ValueError: there is no document, or all of them have the same tokens, so that each token's weight is 0.

        Example:
            >>> weights = TokenWeights.idf([["1", "+", "2"], ["3", "+", "2"], ["5", "+", "6"]])
            >>> [round(weight, 4) for weight in weights.of(["+", "2", "1", "9"])]  # log of 4/4, 4/3, 4/2, 4/1
            [0.0, 0.2877, 0.6931, 1.3863]

        Source: the ``idf`` option of BERTScore (Zhang et al. 2020, arXiv 1904.09675, equation 2 and ``get_idf_dict`` of
        its code, which adds 1 to both counts).
        """
        found: Counter[Hashable] = Counter()
        count = 0
        for document in documents:
            found.update(dict.fromkeys(document).keys())  # a set has another order in each process
            count += 1
        weights = {token: math.log((count + 1) / (number + 1)) for token, number in found.items()}
        if not any(weights.values()):
            raise ValueError(
                f"Inverse document frequencies need references that differ, got {count} with {len(found)} tokens, all "
                "of which are in each of them, so that every token's weight would be 0."
            )
        return cls(weights, math.log(count + 1))

    def of(self, tokens: Iterable[Hashable]) -> list[float]:
        """The weight of each of these tokens, in order."""
        return [self.weights.get(token, self.unseen) for token in tokens]

    def state(self) -> dict[str, Any]:
        """The table as plain data, for a checkpoint."""
        return {"weights": dict(self.weights), "unseen": self.unseen}


def heaviest_common_subsequence(ours: Sequence[str], theirs: Sequence[str], weights: TokenWeights) -> float:
    """The largest total weight of a common subsequence. With weights of 1 it is the length of the longest one.

    Args:
        ours: one list of tokens.
        theirs: the other list.
        weights: the weight of each token.

    Example:
        >>> weights = TokenWeights({"a": 1.0, "b": 1.0, "c": 5.0}, unseen=0.0)
        >>> heaviest_common_subsequence(["a", "b", "c"], ["c", "a", "b"], weights)  # c, although a b is longer
        5.0
    """
    import numpy as np

    common = {token for token in set(ours) & set(theirs) if weights.weights.get(token, weights.unseen) > 0}
    number = {token: index for index, token in enumerate(common)}
    shorter, longer = sorted(([number[t] for t in tokens if t in number] for tokens in (ours, theirs)), key=len)
    values = weights.of(number)
    columns = np.array(longer, dtype=np.int64)
    # best[j] is the heaviest subsequence of the shorter list so far with the first j tokens of the longer one.
    best = np.zeros(len(longer) + 1)
    for token in shorter:
        extended = np.where(columns == token, best[:-1] + values[token], best[1:])
        np.maximum.accumulate(np.maximum(extended, best[1:]), out=best[1:])
    return float(best[-1])
