"""Options of the command line that name a part of a setting, such as ``--model.policy.revision=null``.

jsonargparse reads the text of such an option as YAML, writes the result back as Python would print it, and gives that
to the parser of the part. ``null`` so becomes the text "None", and ``Note: be brief`` becomes "{'Note': 'be brief'}".
It also has no numbers for the items of lists. Both are mended here. All uses of jsonargparse's private parts are in
this file. They were checked against jsonargparse 4.53, and commands/test_nested_options fails if a release changes one.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

_internals: Any = importlib.import_module("jsonargparse._typehints")
_NEEDED = ("ActionTypeHint", "NestedArg", "parse_value_or_config", "subclass_spec_as_namespace")
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
    check, specify = action._check_type, _internals.subclass_spec_as_namespace

    @wraps(check)
    def check_type(self: Any, value: Any, **options: Any) -> Any:
        if not isinstance(value, nested):
            return check(self, value, **options)
        number, _, rest = value.key.partition(".")
        config: Any = options.get("cfg")
        items = config.get(self.dest) if config and number.isdecimal() else None
        token = _text.set(value.val if isinstance(value.val, str) else None)
        try:
            if not isinstance(items, list):
                return check(self, value, **options)
            index = _checked_index(int(number), items, self.dest)
            if rest:  # jsonargparse gives a part's option to the last item
                before = type(config)({self.dest: items[: index + 1]})
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

    action._check_type = check_type
    _internals.subclass_spec_as_namespace = subclass_spec_as_namespace
    try:
        yield
    finally:
        action._check_type = check
        _internals.subclass_spec_as_namespace = specify


def _checked_index(index: int, items: list[Any], name: str) -> int:
    if index >= len(items):
        last = f"the last one is number {len(items) - 1}" if items else "it is empty"
        raise TypeError(f'Parser key "{name}.{index}":\n  The list has no item {index}: {last}.')
    return index
