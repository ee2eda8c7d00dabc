"""Functions of the user's own for advantages and loss: how they are found, called, checked and named."""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lightning_lambdapo.functional.advantages import prepare_groups
from lightning_lambdapo.functional.losses import LossOutput, policy_loss

Function = Callable[..., Any]
_UNSAVED = "not_saved"  # the one key of what a checkpoint has in place of a function that no path leads to
_LOSS_ARGUMENTS = list(inspect.signature(policy_loss).parameters)


def find_function(setting: str, value: Any, names: tuple[str, ...]) -> Function | None:
    """The function that a setting chooses, or None if it is one of the built-in ``names``.

    Args:
        setting: its name, for errors.
        value: a built-in name, the import path of a function (or of a class that needs no arguments), a mapping of
            ``class_path`` and ``init_args``, or something to call.
        names: the built-in names.

    Raises:
        ValueError: nothing that can be called is found. The sentence says why.
    """
    if isinstance(value, str):
        if value in names:
            return None
        if "." not in value:
            raise ValueError(
                f"`{setting}` must be one of {', '.join(names)}, or the import path of a function such as "
                f"my_package.my_module.my_function, got {value!r}."
            )
        found = _imported(setting, value)
        return _built(setting, value, found, {}) if inspect.isclass(found) else _callable(setting, value, found)
    if isinstance(value, Mapping):
        if _UNSAVED in value:
            raise ValueError(
                f"`{setting}` was {value[_UNSAVED]}, given in Python, and no import path leads to it, so it was not "
                "saved. Give it again: load_from_checkpoint(path, algorithm=AlgorithmConfig(...)). Or define it in a "
                "module that can be imported."
            )
        path, arguments = value.get("class_path"), value.get("init_args") or {}
        if (
            not isinstance(path, str)
            or not isinstance(arguments, Mapping)
            or value.keys() - {"class_path", "init_args"}
        ):
            raise ValueError(f"`{setting}` as a mapping has a class_path and perhaps init_args, got {dict(value)!r}.")
        found = _imported(setting, path)
        if not inspect.isclass(found):
            raise ValueError(f"`{setting}.class_path` is {path!r}, which is no class. Give a function as a plain text.")
        return _built(setting, path, found, arguments)
    return _callable(setting, repr(value), value)


def check_arguments(setting: str, function: Function, *arguments: str, keywords: bool) -> None:
    """Refuse a function that does not take what it will be called with.

    Args:
        setting: its name.
        function: what will be called. Nothing is checked if Python does not know its parameters.
        arguments: names of the arguments.
        keywords: they are passed by name, otherwise in this order.

    Raises:
        ValueError: they do not fit its parameters.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**dict.fromkeys(arguments)) if keywords else signature.bind(*arguments)
    except TypeError as error:
        how = "by name (end its parameters with **others for those it ignores)" if keywords else "in this order"
        raise ValueError(
            f"`{setting}` is {function_name(function)}{signature}, which does not fit its call: {error}. "
            f"It receives {', '.join(arguments)}, {how}."
        ) from error


def check_estimator(setting: str, function: Function) -> None:
    """Refuse an estimator that does not take rewards, confidence and validity."""
    check_arguments(setting, function, "rewards", "confidence", "valid", keywords=False)


def check_loss(setting: str, function: Function) -> None:
    """Refuse a loss that does not take the keyword arguments of :func:`policy_loss`."""
    check_arguments(setting, function, *_LOSS_ARGUMENTS, keywords=True)


@torch.no_grad()
def own_advantages(function: Function, rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """Advantages by a function of the user's own.

    Args:
        function: called with the other three. Rewards and confidence have 0 in places that are not valid.
        rewards: ``(B, G)`` float.
        confidence: ``(B, G)`` float.
        valid: ``(B, G)`` bool.

    Returns:
        ``(B, G)``, 0 where not valid.

    Raises:
        ValueError: it returned something else than ``(B, G)`` or ``(B * G,)`` finite numbers, naming the function.

    Example:
        >>> rewards = torch.tensor([[1.0, 0.0]])
        >>> own_advantages(lambda r, s, valid: r - 0.5, rewards, torch.zeros(1, 2), rewards >= 0)
        tensor([[ 0.5000, -0.5000]])
    """
    name = function_name(function)
    rewards, confidence, valid = prepare_groups(rewards, confidence, valid)
    with _named(f"the estimator {name}"):
        found = function(rewards.clone(), confidence.clone(), valid.clone())
    shape = tuple(rewards.shape)
    if not isinstance(found, Tensor) or tuple(found.shape) not in (shape, (math.prod(shape),)):
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)[:100]
        raise ValueError(
            f"The estimator {name} must return one advantage per completion, a tensor of shape {shape} or "
            f"({math.prod(shape)},), got {got}."
        )
    advantages = torch.where(valid, found.to(rewards).view(shape), 0.0)
    if not advantages.isfinite().all():
        place = tuple((~advantages.isfinite()).nonzero()[0].tolist())
        raise ValueError(
            f"The estimator {name} returned {advantages[place].item()} for completion {place[1]} of group {place[0]}, "
            f"whose rewards are {[round(each, 4) for each in rewards[place[0]].tolist()]}. An advantage must be "
            "finite. A division by a standard deviation needs a guard for groups of equal rewards."
        )
    return advantages


def own_loss(function: Function) -> Callable[..., LossOutput]:
    """A function of the user's own with the parameters of :func:`policy_loss`, and its result checked.

    Where it returns a scalar, the statistics to log are those of :func:`policy_loss`, with a clip fraction of 0.

    Args:
        function: called with all arguments of :func:`policy_loss` by name.
    """
    name = function_name(function)

    @wraps(policy_loss)
    def checked(*values: Any, **settings: Any) -> LossOutput:
        arguments = dict(zip(_LOSS_ARGUMENTS, values, strict=False)) | settings
        with _named(f"the loss {name}"):
            found = function(**arguments)
        loss = found.loss if isinstance(found, LossOutput) else found
        if not isinstance(loss, Tensor) or loss.shape != ():
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)[:100]
            raise ValueError(f"The loss {name} must return a scalar tensor or a LossOutput, got {got}.")
        if arguments["logprobs"].requires_grad and not loss.requires_grad:
            raise ValueError(
                f"The loss {name} returned a tensor without a gradient, so nothing would be learnt. Compute it from "
                "`logprobs`, outside torch.no_grad and without detach."
            )
        if not loss.isfinite() and _finite(arguments):  # otherwise it is the model that is not finite
            raise ValueError(
                f"The loss {name} returned {loss.item()} from finite log-probabilities and advantages. Values where "
                "`mask` is False may be anything: replace them by torch.where before you compute with them."
            )
        if isinstance(found, LossOutput):
            return found
        with torch.no_grad():
            known = policy_loss(**arguments)
        return LossOutput(loss, known.mean_kl, torch.zeros_like(known.clip_fraction), known.ratio_max, known.importance)

    return checked


def function_name(value: Any) -> str:
    """What a setting's function is called in errors, logs and reports.

    Example:
        >>> function_name("grpo"), function_name({"class_path": "mine.Clipped"}), function_name(math.prod)
        ('grpo', 'mine.Clipped', 'math.prod')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return str(value.get("class_path") or value.get(_UNSAVED))
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def plain_function(value: Any) -> Any:
    """A setting's function as plain data: a text or mapping as it is, a function as its import path.

    What no import path leads to (a lambda, a function inside another one or of the program itself, an object) becomes
    a note, which :func:`find_function` refuses.

    Example:
        >>> plain_function("grpo"), plain_function(math.prod), plain_function(lambda rewards, *_: rewards)
        ('grpo', 'math.prod', {'not_saved': '...<lambda>'})
    """
    if isinstance(value, str | Mapping):
        return value
    path = function_name(value)
    if not path.startswith("__main__."):
        try:
            if _imported("", path) is value:
                return path
        except ValueError:
            pass
    return {_UNSAVED: path}


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Add to an exception in whose function it was raised."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This was raised in {what}.")
        raise


def _finite(arguments: Mapping[str, Any]) -> bool:
    mask = arguments["mask"].bool()
    tensors = [arguments.get(name) for name in ("logprobs", "old_logprobs", "ref_logprobs", "behavior_logprobs")]
    rows = [value[mask] for value in tensors if value is not None] + [arguments["advantages"][mask.any(-1)]]
    return all(bool(each.isfinite().all()) for each in rows)


def _imported(setting: str, path: str) -> Any:
    """What an import path leads to: an attribute of a module, or an attribute of one."""
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"`{setting}` is {path!r}, which is no import path such as my_package.my_module.my_function.")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                if length > 1:
                    continue
                raise ValueError(
                    f"`{setting}` is {path!r}, and there is no module {name!r}. Install its package, or put its "
                    "directory on PYTHONPATH."
                ) from error
            raise ValueError(f"`{setting}` is {path!r}, and importing {name} failed: {error}.") from error
        except Exception as error:
            raise ValueError(
                f"`{setting}` is {path!r}, and importing {name} failed: {type(error).__name__}: {error}."
            ) from error
        for part in parts[length:]:
            if not hasattr(found, part):
                close = difflib.get_close_matches(part, dir(found), n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ValueError(f"`{setting}` is {path!r}, and {name} has no {part!r}.{hint}")
            found, name = getattr(found, part), f"{name}.{part}"
        return found
    raise ValueError(f"`{setting}` is {path!r}, which names a module and no function in it.")


def _built(setting: str, path: str, cls: Any, arguments: Mapping[str, Any]) -> Function:
    if not any("__call__" in vars(each) for each in cls.__mro__):  # before anything of it runs
        raise ValueError(f"`{setting}` is the class {path}, whose objects cannot be called. Give it a __call__.")
    try:
        built = cls(**arguments)
    except Exception as error:
        raise ValueError(
            f"`{setting}` is the class {path}, which cannot be built with init_args {dict(arguments)!r}: "
            f"{type(error).__name__}: {error}."
        ) from error
    return _callable(setting, path, built)


def _callable(setting: str, shown: str, value: Any) -> Function:
    if not callable(value):
        raise ValueError(
            f"`{setting}` is {shown}, which is {type(value).__name__} and cannot be called. Give a function, or a "
            "class with __call__."
        )
    found: Function = value
    return found
