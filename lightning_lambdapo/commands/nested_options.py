"""Options of the command line that name a part of a setting, such as ``--model.policy.revision=null``.

jsonargparse reads the text of such an option as YAML, writes the result back as Python would print it, and gives that
to the parser of the part. ``null`` so becomes the text "None", and ``Note: be brief`` becomes "{'Note': 'be brief'}".
It also has no numbers for the items of lists. Both are mended here. All uses of jsonargparse's private parts are in
this file. They were checked against jsonargparse 4.53, and commands/test_nested_options fails if a release changes one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jsonargparse import Namespace
from jsonargparse import _typehints as internals

_Nested = internals.NestedArg
_Setting = internals.ActionTypeHint
_WHOLE = ("class_path", "init_args", "dict_kwargs")

#: The text of the option that is being read, as it was given.
_text: ContextVar[str | None] = ContextVar("text", default=None)


@contextmanager
def nested_options() -> Iterator[None]:
    """Inside this context a part's option keeps its text, and numbers choose items of lists.

    Without the private parts that this needs, jsonargparse's own behaviour remains.
    """
    check, specify = _Setting._check_type, internals.subclass_spec_as_namespace

    def check_type(self: Any, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        if not isinstance(value, _Nested):
            return check(self, value, append=append, cfg=cfg, mode=mode)
        number, _, rest = value.key.partition(".")
        items = cfg.get(self.dest) if cfg and number.isdecimal() else None
        token = _text.set(value.val if isinstance(value.val, str) else None)
        try:
            if not isinstance(items, list):
                return check(self, value, append=append, cfg=cfg, mode=mode)
            index = _checked_index(int(number), items, self.dest)
            if rest:  # jsonargparse gives a part's option to the last item
                part, before = _Nested(key=rest, val=value.val), Namespace({self.dest: items[: index + 1]})
                return [*check(self, part, cfg=before, mode=mode), *items[index + 1 :]]
            whole = [*items[:index], internals.parse_value_or_config(value.val)[0], *items[index + 1 :]]
            return check(self, whole, cfg=cfg, mode=mode)
        finally:
            _text.reset(token)

    def subclass_spec_as_namespace(val: Any, *arguments: Any, **options: Any) -> Any:
        text = _text.get()
        if isinstance(val, _Nested) and text is not None and val.key not in _WHOLE:
            val = _Nested(key=val.key.removeprefix("init_args."), val=text)
        return specify(val, *arguments, **options)

    _Setting._check_type = check_type
    internals.subclass_spec_as_namespace = subclass_spec_as_namespace
    try:
        yield
    finally:
        _Setting._check_type = check
        internals.subclass_spec_as_namespace = specify


def _checked_index(index: int, items: list[Any], name: str) -> int:
    if index >= len(items):
        last = f"the last one is number {len(items) - 1}" if items else "it is empty"
        raise TypeError(f'Parser key "{name}.{index}":\n  The list has no item {index}: {last}.')
    return index
