"""The reward interface, and how several rewards become one total."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """The ``N`` rows that a reward judges, in group-major order; every field has ``N`` entries.

    Attributes:
        prompts: prompt texts.
        completions: completion texts, without special tokens.
        answers: final answers, None where the data has none.
        references: reference solutions, None where the data has none.
        completion_lengths: completion lengths in tokens.
        truncated: True where the completion hit ``max_new_tokens``.
        columns: all the other columns of the data, one mapping per row.
    """

    prompts: list[str]
    completions: list[str]
    answers: list[str | None]
    references: list[str | None]
    completion_lengths: list[int]
    truncated: list[bool]
    columns: list[dict[str, Any]]


class Reward(ABC):
    """A judge of completions.

    Args:
        weight: coefficient of this reward in the total. Finite.
        name: key of this part in logs; unique among a module's rewards. The part called ``accuracy`` is also what
            accuracy, pass@k and maj@k are computed from: a row is correct where it exceeds 0.5.
    """

    #: Fields of :class:`RewardInputs` without which this reward has nothing to say: ``"answers"``, ``"references"``.
    requires: ClassVar[tuple[str, ...]] = ()

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        self.weight = weight
        self.name = name or type(self).__name__

    @abstractmethod
    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        """Judge every row: a finite number, or None where the reward is not applicable."""

    def vote(self, completion: str) -> str | None:
        """The final answer in a canonical form, for majority voting; None where there is none (or no such notion)."""
        return None

    def statistics(self) -> dict[str, float]:
        """Extra numbers about the last call, logged as ``reward/<name>/<key>``."""
        return {}

    def close(self) -> None:
        """Free what the reward holds (worker processes); called once at the end of a run."""
