"""Options of the command line that name a part of a setting, such as ``--model.policy.revision=null``.

jsonargparse reads the text of such an option as YAML, writes the result back as Python would print it, and gives that
to the parser of the part. ``null`` so becomes the text "None", and ``Note: be brief`` becomes "{'Note': 'be brief'}".
It also has no numbers for the items of lists, cannot change a class that is plain data, such as an estimator of the
user's own, and has no arguments for a plain function among the rewards. All four are mended here. All uses of
jsonargparse's private parts are in this file. They were checked against jsonargparse 4.53, and
commands/test_nested_options fails if a release changes one.
"""

import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jsonargparse import ArgumentParser, Namespace

_internals: Any = importlib.import_module("jsonargparse._typehints")
_NEEDED = ("ActionTypeHint", "NestedArg", "parse_value_or_config", "subclass_spec_as_namespace")
_REWARDS, _FUNCTION_REWARD = "rewards", "lightning_lambdapo.rewards.FunctionReward"
_WHOLE = ("class_path", "init_args", "dict_kwargs")

#: The text of the option that is being read, as it was given.
_text: ContextVar[str | None] = ContextVar("text", default=None)


@contextmanager
def nested_options() -> Iterator[None]:
    """Inside this context a part's option keeps its text, and numbers choose items of lists.

    Under a jsonargparse without the private parts that this needs, nothing changes.
    """
    if not all(hasattr(_internals, name) for name in _NEEDED):
        yield
        return
    action, nested = _internals.ActionTypeHint, _internals.NestedArg
    check, specify, call = action._check_type, _internals.subclass_spec_as_namespace, action.__call__

    @wraps(check)
    def check_type(self: Any, value: Any, **options: Any) -> Any:
        if not isinstance(value, nested):
            return check(self, value, **options)
        number, _, rest = value.key.partition(".")
        config: Any = options.get("cfg")
        items = config.get(self.dest) if config else None
        if isinstance(items, list) and not number.isdecimal():  # jsonargparse gives a part's option to the last item
            if self.dest == _REWARDS and items and callable(items[-1]):
                number, rest = str(len(items) - 1), value.key
            else:
                items = None
        token = _text.set(value.val if isinstance(value.val, str) else None)
        try:
            if not isinstance(items, list):
                return check(self, value, **options)
            index = _checked_index(int(number), items, self.dest)
            if rest:
                kept = [*items[:index], _with_arguments(items[index]) if self.dest == _REWARDS else items[index]]
                before = type(config)({self.dest: kept})
                changed = check(self, nested(key=rest, val=value.val), **options | {"cfg": before})
                return [*changed, *items[index + 1 :]]
            whole = [*items[:index], _internals.parse_value_or_config(value.val)[0], *items[index + 1 :]]
            return check(self, whole, **options)
        finally:
            _text.reset(token)

    @wraps(specify)
    def subclass_spec_as_namespace(val: Any, *arguments: Any, **options: Any) -> Any:
        text = _text.get()
        if isinstance(val, nested) and text is not None and val.key not in _WHOLE:
            val = nested(key=val.key.removeprefix("init_args."), val=text)
        return specify(val, *arguments, **options)

    @wraps(call)
    def call_with_class(self: Any, *arguments: Any, **options: Any) -> Any:
        if len(arguments) == 4:
            parser, config, value, option = arguments
            before = config.get(self.dest)
            if type(before) is dict and "class_path" in before:  # jsonargparse expects a Namespace here
                part = str(option).removeprefix("--").removeprefix(self.dest).removeprefix(".")
                given = _internals.parse_value_or_config(value, enable_path=False, simple_types=bool(part))[0]
                config[self.dest] = None
                arguments = parser, config, _changed_class(before, part, given), f"--{self.dest}"
        return call(self, *arguments, **options)

    action._check_type = check_type
    action.__call__ = call_with_class
    _internals.subclass_spec_as_namespace = subclass_spec_as_namespace
    try:
        yield
    finally:
        action._check_type = check
        action.__call__ = call
        _internals.subclass_spec_as_namespace = specify


def _with_arguments(reward: Any) -> Any:
    """A plain function among the rewards as a class that has a weight, a name and a timeout."""
    if not callable(reward) or isinstance(reward, type):
        return reward
    space: Any = Namespace  # its constructor has no types
    return space(class_path=_FUNCTION_REWARD, init_args=space(function=reward))


def replaced_class(before: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A class where another one is, as jsonargparse sets it: arguments stay that the new class takes as well.

    Args:
        before: what is there: a class and its arguments, arguments alone, or something else.
        given: ``class_path``, and perhaps ``init_args``.

    Example:
        >>> before = {"class_path": "a.B", "init_args": {"x": 1, "y": 2}}
        >>> replaced_class(before, {"class_path": "a.B", "init_args": {"x": 3}})
        {'class_path': 'a.B', 'init_args': {'x': 3, 'y': 2}}
    """
    if not isinstance(before, Mapping):
        return dict(given)
    is_class = bool(before.keys() & {"class_path", "init_args"})
    earlier = (before.get("init_args") or {}) if is_class else before
    taken = _parameters(before.get("class_path") if is_class else None, str(given["class_path"]), earlier)
    arguments = merged({name: earlier[name] for name in taken}, given.get("init_args") or {})
    return {**given, "init_args": arguments} if arguments else dict(given)


def merged(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with others in them. A class among them is replaced as a class is, other mappings are merged."""
    found = dict(before)
    for name, value in given.items():
        earlier = found.get(name)
        if isinstance(value, Mapping) and "class_path" in value:
            found[name] = replaced_class(earlier, value)
        elif isinstance(value, Mapping) and isinstance(earlier, Mapping):
            found[name] = merged(earlier, value)
        else:
            found[name] = value
    return found


def _parameters(before: str | None, now: str, names: Collection[str]) -> Collection[str]:
    """Which of the arguments of one class another takes. None of a class that cannot be imported."""
    if before is not None and before.rpartition(".")[2] == now.rpartition(".")[2]:
        return names
    module, _, name = now.rpartition(".")
    try:
        added = ArgumentParser().add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
    except Exception:  # whatever a module of the user's does. The run's own parser names the mistake.
        return ()
    taken = {each.partition(".")[0] for each in added}
    return [each for each in names if each in taken]


def _changed_class(before: dict[str, Any], part: str, value: Any) -> Any:
    """A class that is plain data, with another value of the whole (no ``part``), its path or its arguments."""
    if part in ("", "class_path"):
        given = {"class_path": value} if part else value
        return replaced_class(before, given) if isinstance(given, dict) and "class_path" in given else given
    arguments = dict(before.get("init_args") or {})
    if part == "init_args":
        return {**before, "init_args": {**arguments, **value} if isinstance(value, dict) else value}
    *path, last = part.removeprefix("init_args.").split(".")
    place = arguments
    for name in path:
        inner = place.get(name)
        place[name] = dict(inner) if isinstance(inner, dict) else {}
        place = place[name]
    place[last] = value
    return {**before, "init_args": arguments}


def _checked_index(index: int, items: list[Any], name: str) -> int:
    if index >= len(items):
        last = f"the last one is number {len(items) - 1}" if items else "it is empty"
        raise TypeError(f'Parser key "{name}.{index}":\n  The list has no item {index}: {last}.')
    return index
