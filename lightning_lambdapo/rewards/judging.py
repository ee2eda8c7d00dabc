"""Every reward judges every completion, and the parts become one total."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_lambdapo.datatypes import RewardOutcome
from lightning_lambdapo.rewards.base import Reward, RewardInputs
from lightning_lambdapo.rewards.deadline import DeadlineError, deadline

_SHOWN_CHARACTERS = 80


_LARGEST = torch.finfo(torch.float32).max


def judge(
    rewards: Sequence[Reward], inputs: RewardInputs, *, group_size: int, device: torch.device | str | None = None
) -> RewardOutcome:
    r"""Let every reward judge every row, and combine the parts.

    .. math:: R_n = \sum_{k\,\text{applicable to } n} \text{weight}_k \, \text{part}_{k,n}

    Weights are not renormalised. A part that is None for a whole group is omitted from that group's totals. A part that
    is None for some rows of a group makes those rows invalid, because their totals could not be compared with their
    peers'. A row without any applicable part is invalid.

    Args:
        rewards: judges with unique names.
        inputs: the ``N = B * G`` rows, group-major.
        group_size: ``G``.
        device: where the result goes. None is the CPU.

    Returns:
        ``(B, G)`` float32 total and parts (NaN where None), bool validity.

    Raises:
        RuntimeError: a reward raised an exception, which is its cause, or did not return within its ``timeout``.
        TypeError: a reward returned anything but a sequence of numbers and None.
        ValueError: wrong number of values, a value or total that is not finite in float32, or a group size that does
            not divide ``N``.

    Example:
        >>> from lightning_lambdapo.rewards import FunctionReward
        >>> def short(completions):
        ...     return [len(text) < 3 for text in completions]
        >>> inputs = RewardInputs(
        ...     prompts=["?"] * 2, completions=["ab", "abc"], answers=[None] * 2, references=[None] * 2,
        ...     completion_lengths=[1, 1], truncated=[False] * 2, columns=[{}] * 2)
        >>> outcome = judge([FunctionReward(short, weight=0.5)], inputs, group_size=2)
        >>> outcome.total, outcome.parts
        (tensor([[0.5000, 0.0000]]), {'short': tensor([[1., 0.]])})
    """
    rows = len(inputs.completions)
    if group_size < 1 or rows % group_size:
        raise ValueError(f"`group_size` must divide the number of completions ({rows}), got {group_size}.")
    total = torch.zeros(rows // group_size, group_size, dtype=torch.float64)
    some = torch.zeros_like(total, dtype=torch.bool)
    valid = torch.ones_like(some)
    parts = {}
    for reward in rewards:
        part = _judged(reward, inputs).view_as(total)
        applicable = ~part.isnan()
        total += reward.weight * part.nan_to_num(0.0)
        some |= applicable
        valid &= applicable | ~applicable.any(-1, keepdim=True)
        parts[reward.name] = part.to(device, torch.float32)
    valid &= some
    total = torch.where(valid, total, 0.0)
    if rows and float(total.abs().max()) > _LARGEST:
        raise ValueError(f"A total reward of {float(total.abs().max()):.3g} does not fit float32. Lower the weights.")
    return RewardOutcome(total=total.to(device, torch.float32), parts=parts, valid=valid.to(device))


def _judged(reward: Reward, inputs: RewardInputs) -> Tensor:
    """The values that one reward gives to all rows: ``(N,)`` float64, NaN for None."""
    try:
        with deadline(reward.timeout):
            values: Any = reward(inputs)
    except DeadlineError as error:
        raise RuntimeError(
            f"The reward {reward.name!r} did not return within {reward.timeout:g} seconds. The traceback shows where "
            "it hangs. Set its `timeout` if it needs longer."
        ) from error
    except Exception as error:
        raise RuntimeError(f"The reward {reward.name!r} raised {type(error).__name__}: {error}") from error
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"The reward {reward.name!r} must return a list of numbers, got {type(values).__name__}.")
    if len(values) != len(inputs.completions):
        raise ValueError(
            f"The reward {reward.name!r} returned {len(values)} values for {len(inputs.completions)} completions."
        )
    numbers = [math.nan] * len(values)
    for row, value in enumerate(values):
        if value is not None:
            numbers[row] = _number(value, reward.name, row, inputs.completions[row])
    return torch.tensor(numbers, dtype=torch.float64)


def _number(value: Any, name: str, row: int, completion: str) -> float:
    """One value as a float, or an error that names its reward and row."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    shown = completion if len(completion) <= _SHOWN_CHARACTERS else completion[:_SHOWN_CHARACTERS] + "..."
    if not isinstance(value, Real):
        raise TypeError(
            f"The reward {name!r} returned {value!r} ({type(value).__name__}) for row {row}. It must be a number or "
            f"None. Its completion: {shown!r}."
        )
    number = float(value) if not isinstance(value, int) or abs(value) <= _LARGEST else math.inf
    if not abs(number) <= _LARGEST:  # NaN too
        raise ValueError(
            f"The reward {name!r} returned {value!r} for row {row}. It must be finite (None means not applicable). "
            f"Its completion: {shown!r}."
        )
    return number
