"""Single values of settings: numbers and instances, checked with one sentence each, and paths."""

import os
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")


def check_whole(name: str, value: object, lowest: int, *, highest: int = 2**31 - 1, reason: str = "") -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number from ``lowest`` to ``highest``.

    Args:
        name: of the setting.
        value: its value.
        lowest: least number that makes sense.
        highest: largest number. The default is more than any machine can work on.
        reason: what the sentence ends with, after "got ...".

    Example:
        >>> check_whole("group_size", 1, 2)
        Traceback (most recent call last):
        ValueError: `group_size` must be at least 2, got 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}{reason}.")
    if int(value) < lowest:
        raise ValueError(f"`{name}` must be at least {lowest}, got {value}{reason}.")
    if int(value) > highest:
        raise ValueError(f"`{name}` must be at most {highest}, got {value}.")


def check_real(name: str, value: object, good: Callable[[float], bool], wanted: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a number that is ``good``. NaN is good for nothing that compares it.

    Example:
        >>> check_real("dropout", float("nan"), lambda share: 0 <= share < 1, "in [0, 1)")
        Traceback (most recent call last):
        ValueError: `dropout` must be in [0, 1), got nan.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not good(cast(float, value)):
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")


def check_seed(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number of 64 bits, as torch's generators take."""
    check_whole(name, value, -(2**63), highest=2**63 - 1)


def check_instance(cls: type[T], value: object) -> T:
    """The value. Raise ``TypeError`` unless it is an instance of a class of settings.

    Example:
        >>> check_instance(Path, "models")
        Traceback (most recent call last):
        TypeError: A Path is needed, got 'models'. Pass Path('models').
    """
    if not isinstance(value, cls):
        advice = repr(value) if isinstance(value, str) else "..."
        raise TypeError(f"A {cls.__name__} is needed, got {value!r}. Pass {cls.__name__}({advice}).")
    return value


def path_text(value: Any) -> Any:
    """A path as text, with ``~`` as the home directory. Anything else is returned unchanged.

    Example:
        >>> path_text(Path("models") / "tiny"), path_text("org/model"), path_text(None)
        ('models/tiny', 'org/model', None)
    """
    # A Path would rewrite hub ids, and refuses the home of an unknown user.
    return os.path.expanduser(os.fspath(value)) if isinstance(value, str | os.PathLike) else value  # noqa: PTH111


def home_path(text: str) -> Path:
    """A path from a command line, with ``~`` as the home directory: shells leave it in ``--output=~/runs``."""
    return Path(path_text(text))
