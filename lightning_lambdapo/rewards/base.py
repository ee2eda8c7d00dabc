"""The reward interface, and how several rewards become one total."""

import copy
import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

#: Texts -> embeddings of their tokens ``(N, S, D)``, and which of them count ``(N, S)`` bool.
Encoder = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """The ``N`` rows that a reward judges, in group-major order. Every field has ``N`` entries.

    Attributes:
        prompts: prompt texts.
        completions: completion texts, without the special tokens that ``rollout.keep_special_tokens`` strips.
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
        name: key of this part in logs, unique among a module's rewards. Accuracy, pass@k and maj@k are computed from
            the part called ``accuracy``: a row is correct where it exceeds 0.5.
    """

    #: Wall seconds that one call may take before the run ends with an error. None if the reward has its own limit.
    timeout: float | None = 600.0

    #: Fields of :class:`RewardInputs` that this reward cannot judge without: ``"answers"``, ``"references"``.
    requires: ClassVar[tuple[str, ...]] = ()

    #: Hidden state that the module's encoder returns if ``needs_encoder``: 0 is the input embedding, -1 the last.
    encoder_layer: int = -1

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        self.weight = weight
        self.name = name or type(self).__name__

    @property
    def needs_encoder(self) -> bool:
        """True if the module must provide an encoder: the policy as it was before training."""
        return False

    def prepare_encoder(self, encoder: Encoder | None, device: torch.device) -> None:  # noqa: B027 -- most need none
        """Receive the encoder. The module calls this before a run, once its models are loaded.

        Args:
            encoder: of the policy before training. None unless ``needs_encoder``.
            device: where the module computes, for a reward with its own model.
        """

    def reads_token(self, token: str) -> bool | None:
        """Whether this reward reads the text of a special token in completions. None if it is not known.

        By default a completion keeps the special tokens that a reward reads, and if one does not know, those that come
        in pairs, such as ``<think>`` and ``</think>``.
        """
        return None

    @property
    def needs_training_references(self) -> bool:
        """True if the reward must see the references of the training set before it can judge."""
        return False

    def prepare_references(self, references: Sequence[str] | None) -> None:  # noqa: B027 -- most need none
        """Receive the training set's references. The module calls this at the start of a run that judges.

        Args:
            references: of all training rows that have one, the same on every rank. None if they are not known. It is
                called only if ``needs_training_references``.
        """

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint saves of this reward, as plain data."""
        return {}

    def load_checkpoint_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 -- most have none
        """Load what :meth:`checkpoint_state` returned, if that was anything."""

    @abstractmethod
    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        """Judge every row: a finite number, or None where the reward is not applicable."""

    def vote(self, completion: str) -> str | None:
        """The final answer in a canonical form, for majority voting. None where there is none."""
        return None

    def statistics(self) -> dict[str, float]:
        """Extra numbers about the last call, logged as ``reward/<name>/<key>``."""
        return {}

    def close(self) -> None:  # noqa: B027 -- most rewards have nothing to free
        """Free resources such as worker processes. Called once at the end of a run."""


#: What every reward function may take, besides the columns of the data.
_ARGUMENTS = tuple(field.name for field in dataclasses.fields(RewardInputs) if field.name != "columns")


class FunctionReward(Reward):
    """A plain function as a reward.

    The function is called with keyword arguments that are lists of ``N`` entries: ``prompts``, ``completions``,
    ``answers``, ``references``, ``completion_lengths``, ``truncated``, and every other column of the data under its own
    name (None where a row lacks it). It gets only those that its signature takes, or all if it takes ``**kwargs``.

    Args:
        function: returns ``N`` finite numbers, None where it does not apply.
        weight: coefficient in the total.
        name: key in logs. By default the function's own name, which a lambda or a partial lacks.
        timeout: wall seconds that one call may take before the run ends with an error. None waits forever.

    Raises:
        TypeError: not a function that can be called in this way.
        ValueError: no name, or a timeout that is not above 0.

    Example:
        >>> def brevity(completions, limit):
        ...     return [float(len(text) <= most) for text, most in zip(completions, limit)]
        >>> reward = FunctionReward(brevity)
        >>> inputs = RewardInputs(
        ...     prompts=["?"] * 2, completions=["ab", "abc"], answers=[None] * 2, references=[None] * 2,
        ...     completion_lengths=[1, 1], truncated=[False] * 2, columns=[{"limit": 2}] * 2)
        >>> reward.name, reward(inputs)
        ('brevity', [1.0, 0.0])
    """

    def __init__(
        self,
        function: Callable[..., Sequence[float | None]],
        weight: float = 1.0,
        name: str | None = None,
        timeout: float | None = Reward.timeout,
    ) -> None:
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"A reward must be a Reward object or a function, got {function!r}.")
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"The reward function {function!r} is asynchronous. Wrap it in a function that runs it.")
        name = name or getattr(function, "__name__", "")
        if not name or name == "<lambda>":
            raise ValueError(f"{function!r} has no name of its own to log it under. Use FunctionReward(..., name=...).")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"The timeout of the reward {name!r} must be above 0 seconds, got {timeout}.")
        super().__init__(weight, name)
        self.timeout = timeout
        self.function = function
        parameters = inspect.signature(function).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
        if positional:
            raise TypeError(
                f"The reward function {name!r} must take its arguments by name. {positional} are positional-only."
            )
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        keywords = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._takes = {p.name for p in keywords}
        self._needs = {p.name for p in keywords if p.default is p.empty}

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        """Call the function with the columns that it takes."""
        arguments: dict[str, Any] = {name: copy.copy(getattr(inputs, name)) for name in _ARGUMENTS}
        columns = list(dict.fromkeys(name for row in inputs.columns for name in row))
        self.check_columns(columns)
        arguments |= {name: [row.get(name) for row in inputs.columns] for name in columns}
        chosen = {name: value for name, value in arguments.items() if self._takes_all or name in self._takes}
        return self.function(**chosen)

    def check_columns(self, columns: Collection[str]) -> None:
        """Refuse data without a column that the function takes.

        Args:
            columns: names of the columns of all rows, besides the arguments that every function may take.

        Raises:
            TypeError: naming what the function takes and what there is.
            ValueError: a column has the name of such an argument.
        """
        taken = [name for name in columns if name in _ARGUMENTS]
        if taken:
            raise ValueError(
                f"The data has columns named {taken}, but these are arguments of every reward function. Rename them."
            )
        missing = self._needs.difference(_ARGUMENTS, columns)
        if missing:
            raise TypeError(
                f"The reward function {self.name!r} takes {sorted(missing)}, which is no column of the data. There are "
                f"{[*_ARGUMENTS, *columns]}."
            )


#: What a user may put into a list of rewards.
RewardLike = Reward | Callable[..., Any]


def as_rewards(rewards: Sequence[RewardLike]) -> list[Reward]:
    """Check a list of rewards, and wrap the plain functions in it.

    Args:
        rewards: reward objects or functions (see :class:`FunctionReward`).

    Returns:
        Reward objects in the same order.

    Raises:
        TypeError: something that is neither.
        ValueError: no reward, two of one name, or a weight that is not a finite number.

    Example:
        >>> def short(completions):
        ...     return [float(len(text) < 9) for text in completions]
        >>> [(reward.name, reward.weight) for reward in as_rewards([short, FunctionReward(short, 0.5, name="again")])]
        [('short', 1.0), ('again', 0.5)]
    """
    if isinstance(rewards, Reward) or callable(rewards) or isinstance(rewards, str):
        raise TypeError(f"`rewards` must be a list of rewards, got {rewards!r}. Put it in a list.")
    wrapped = [reward if isinstance(reward, Reward) else FunctionReward(reward) for reward in rewards]
    if not wrapped:
        raise ValueError("`rewards` is empty. Give at least one reward.")
    names = [reward.name for reward in wrapped]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Rewards need unique names, but several are called {twice}. Give each its own `name`.")
    for reward in wrapped:
        if not isinstance(reward.weight, Real) or not math.isfinite(reward.weight):
            raise ValueError(
                f"The weight of the reward {reward.name!r} must be a finite number, got {reward.weight!r}."
            )
    return wrapped
