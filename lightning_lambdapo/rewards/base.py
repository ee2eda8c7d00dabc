"""The reward interface, and how several rewards become one total."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from lightning_lambdapo.datatypes import Scores


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


class FunctionReward(Reward):
    """A plain function as a reward.

    It is called with keyword arguments, one list of ``N`` entries each: the fields of :class:`RewardInputs` other than
    ``columns``, and every column of the data by its own name (None in rows that lack it). It gets those that its
    signature names, or all of them where it takes ``**kwargs``, and returns one finite number or None per row.

    Args:
        function: the judge.
        weight: coefficient in the total.
        name: key of this part in logs; the function's own name by default.

    Raises:
        ValueError: the function has no name of its own and none is given.
    """

    def __init__(self, function: Callable[..., Any], weight: float = 1.0, name: str | None = None) -> None:
        name = name or getattr(function, "__name__", None)
        if name is None or name == "<lambda>":
            raise ValueError(f"The reward function {function!r} has no name; wrap it: FunctionReward(function, name=...).")
        super().__init__(weight, name)
        self.function = function
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._wanted = None if takes_all else {parameter.name for parameter in parameters}

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        """Call the function; see the class."""
        arguments = {field.name: getattr(inputs, field.name) for field in fields(inputs) if field.name != "columns"}
        for column in dict.fromkeys(name for row in inputs.columns for name in row):
            if column in arguments:
                raise ValueError(
                    f"The data has a column {column!r}, which is also an argument of every reward function; rename it."
                )
            arguments[column] = [row.get(column) for row in inputs.columns]
        result: Sequence[float | None] = self.function(
            **{name: value for name, value in arguments.items() if self._wanted is None or name in self._wanted}
        )
        return result


def as_rewards(rewards: Sequence[Reward | Callable[..., Any]]) -> list[Reward]:
    """Wrap plain functions, and refuse lists that cannot be logged or summed.

    Raises:
        TypeError: an entry is neither a reward nor callable.
        ValueError: the list is empty, two rewards share a name, or a weight is not finite.
    """
    wrapped: list[Reward] = []
    for reward in rewards:
        if isinstance(reward, type) or not callable(reward):
            raise TypeError(f"A reward must be a Reward object or a function, got {reward!r}.")
        wrapped.append(reward if isinstance(reward, Reward) else FunctionReward(reward))
    if not wrapped:
        raise ValueError("`rewards` is empty; without a reward there is nothing to learn from.")
    names = [reward.name for reward in wrapped]
    for reward in wrapped:
        if names.count(reward.name) > 1:
            raise ValueError(f"Two rewards are called {reward.name!r}; give one of them another `name`.")
        if not math.isfinite(reward.weight):
            raise ValueError(f"The weight of the reward {reward.name!r} must be finite, got {reward.weight}.")
    return wrapped


def score(
    rewards: Sequence[Reward],
    inputs: RewardInputs,
    *,
    group_size: int,
    device: torch.device | str | None = None,
) -> Scores:
    """Run all rewards and add them up.

    The total of a row is the sum of weight times part over the applicable parts; weights are not renormalised. A part
    that is None for a whole group is left out of that group; None for some of its rows makes those rows invalid; a row
    without any applicable part is invalid.

    Args:
        rewards: the judges.
        inputs: ``N`` rows in group-major order.
        group_size: G.
        device: where the result goes.

    Raises:
        RuntimeError: a reward raised; the message names it.
        TypeError: a reward returned something other than a sequence of numbers and None.
        ValueError: a reward returned the wrong number of values, or one that is not finite; the message names reward
            and row.
    """
    count = len(inputs.completions)
    total = torch.zeros(count // group_size, group_size, dtype=torch.float64)
    valid = torch.ones_like(total, dtype=torch.bool)
    applicable = torch.zeros_like(valid)
    parts = {}
    for reward in rewards:
        part = torch.tensor(_values(reward, inputs), dtype=torch.float64).view_as(total)
        missing = part.isnan()
        absent = missing.all(-1, keepdim=True)
        valid &= absent | ~missing
        applicable |= ~missing
        total += reward.weight * part.nan_to_num(0.0)
        parts[reward.name] = part.float().to(device)
    valid &= applicable
    return Scores(torch.where(valid, total, 0.0).float().to(device), parts, valid.to(device))


def _values(reward: Reward, inputs: RewardInputs) -> list[float]:
    """What a reward says of every row, NaN for None; anything else that is no finite number is an error."""
    try:
        returned = reward(inputs)
    except Exception as error:
        raise RuntimeError(f"The reward {reward.name!r} raised {type(error).__name__}: {error}") from error
    if isinstance(returned, torch.Tensor):
        returned = returned.tolist()
    if isinstance(returned, str) or not isinstance(returned, Sequence):
        raise TypeError(
            f"The reward {reward.name!r} returned {type(returned).__name__}; it must return a sequence with one number "
            "or None per completion."
        )
    if len(returned) != len(inputs.completions):
        raise ValueError(
            f"The reward {reward.name!r} returned {len(returned)} values for {len(inputs.completions)} completions."
        )
    values = []
    for row, value in enumerate(returned):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(_bad_value(reward, row, value, inputs)) from error
        if value is not None and not math.isfinite(number):
            raise ValueError(_bad_value(reward, row, value, inputs))
        values.append(number)
    return values


def _bad_value(reward: Reward, row: int, value: object, inputs: RewardInputs) -> str:
    completion = inputs.completions[row]
    shown = completion if len(completion) <= 80 else f"{completion[:80]}..."
    return (
        f"The reward {reward.name!r} returned {value!r} for row {row} (completion {shown!r}); it must be a finite number, "
        "or None where the reward is not applicable."
    )
