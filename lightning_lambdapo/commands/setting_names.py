"""Names of settings: those that are close to a wrong one, and the help that lists them."""

import difflib
import importlib
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any

from jsonargparse import ArgumentParser

#: The setting that a line is about, and the reason that follows it there.
KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?:\s*(.*)$')
_CLASS = re.compile(r"(?:Problem with given class_path |(?:Got|Given) value: Namespace\(class_path=)'([^']+)'")
#: Where a class is not named, the default one.
_DEFAULTS = {"model": "lightning_lambdapo.LambdaPOModule", "data": "lightning_lambdapo.LambdaPODataModule"}
_MOST = 3  # suggestions


def lines_of(message: str) -> Iterator[tuple[tuple[str, ...], int, bool, str]]:
    r"""The lines of jsonargparse's tree of errors: the keys around each, its indent, whether it is an item, its text.

    Example:
        >>> list(lines_of('Parser key "a":\n  - Parser key "b":\n      Wrong.'))[1:]
        [(('a',), 4, True, 'Parser key "b":'), (('a', 'b'), 6, False, 'Wrong.')]
    """
    keys: list[tuple[int, str]] = []
    for line in filter(str.strip, message.splitlines()):
        text = line.strip().removeprefix("- ")
        indent = len(line.rstrip()) - len(text)
        keys = [(at, key) for at, key in keys if at < indent]
        yield tuple(key for _, key in keys), indent, line.lstrip().startswith("- "), text
        if match := KEY.search(text):
            keys.append((indent, match[1]))


def classes_of(path: Sequence[str], message: str) -> tuple[str, list[str]]:
    """The deepest part of a setting that is a class, and which classes an error of jsonargparse names for it.

    Args:
        path: keys of the setting, as the error's ``Parser key`` lines give them.
        message: the whole error.

    Returns:
        Dotted key of the part, and import paths. An empty key without classes if no part is one.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for around, _, _, text in lines_of(message):
        key = KEY.search(text)
        if match := _CLASS.search(text):
            found.setdefault((*around, key[1]) if key else around, []).append(match[1])
    for size in range(len(path), 0, -1):
        classes = [each for each in dict.fromkeys(found.get(tuple(path[:size]), [])) if _imported(each)]
        if classes:
            return ".".join(path[:size]), classes
    top = ".".join(path).partition(".")[0]
    return (top, [_DEFAULTS[top]]) if top in _DEFAULTS else ("", [])


def help_line(program: str, path: Sequence[str], message: str) -> str:
    """Where the settings beside a wrong one are listed.

    Args:
        program: the command.
        path: keys of the setting, as the error's ``Parser key`` lines give them.
        message: the whole error.

    Example:
        >>> help_line("fit", ["model"], "...")
        'All settings of `model`: fit --model.help (others: fit --help)'
        >>> help_line("fit", ["trainer", "max_steps"], "...")
        'All settings: fit --help'
    """
    place, classes = classes_of(path, message)
    if not classes:
        return f"All settings: {program} --help"
    if len(classes) == 1 and "." in place and is_dataclass(_imported(classes[0])):
        listed = ", ".join(settings_of(classes))  # jsonargparse cannot print the help of a part of this kind
    else:
        value = "" if classes[0] == _DEFAULTS["model"] else f"={classes[0]}"
        listed = f"{program} --{place}.help{value}"
    return f"All settings of `{place}`: {listed} (others: {program} --help)"


def settings_of(classes: Sequence[str]) -> list[str]:
    """Dotted names of all the arguments of classes, those of dataclasses in them too. None of an unknown class."""
    found: dict[str, None] = {}
    for each in classes:
        parser = ArgumentParser()
        with suppress(Exception):  # whatever a class of the user's does. The wrong name has been told.
            parser.add_class_arguments(_imported(each), fail_untyped=False)
            found |= dict.fromkeys(parser.get_defaults(skip_validation=True).keys())
    return list(found)


def _imported(path: str) -> Any:
    """A class, or None if it cannot be imported."""
    module, _, name = path.rpartition(".")
    with suppress(Exception):  # whatever a module of the user's does
        return getattr(importlib.import_module(module), name)


def did_you_mean(wrong: str, names: Collection[str], before: str = "") -> str:
    """A question that ends a sentence about a name that does not exist, or nothing if no name is close.

    Args:
        wrong: the dotted name.
        names: those that exist.
        before: what to print before a name.

    Example:
        >>> names = ["rollout.group_size", "rollout.engine", "seed"]
        >>> did_you_mean("rollout.groupsize", names, "model.")
        ' Did you mean `model.rollout.group_size`?'
        >>> did_you_mean("group_size", names), did_you_mean("rollout.num_generations", names)
        (' Did you mean `rollout.group_size`?', '')
    """
    parent, _, leaf = wrong.rpartition(".")
    siblings = [name for name in names if name.rpartition(".")[0] == parent]
    close = (
        _close(leaf, siblings)
        or difflib.get_close_matches(wrong, list(names), 1, cutoff=0.85)
        or _close(leaf, list(names))
    )
    if not close:
        return ""
    quoted = [f"`{before}{name}`" for name in close[:_MOST]]
    return f" Did you mean {' or '.join(filter(None, [', '.join(quoted[:-1]), quoted[-1]]))}?"


def _close(leaf: str, names: Sequence[str]) -> list[str]:
    """Those of the dotted names whose last part is closest to one."""
    leaves = [name.rpartition(".")[2] for name in names]
    best = difflib.get_close_matches(leaf, leaves, 1, cutoff=0.75)
    return [name for name, each in zip(names, leaves, strict=True) if [each] == best]
