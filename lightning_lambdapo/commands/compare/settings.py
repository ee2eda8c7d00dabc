"""Settings by dotted keys: where they belong in a configuration, and which of them a command line gives."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from lightning_lambdapo.commands.nested_options import merged, replaced_class

#: The path of a class whose name begins with a capital letter. Others may be functions, files or plain texts.
_CLASS = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*")


def with_settings(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with dotted keys set. Keys may omit ``init_args``, and numbers index lists.

    Raises:
        ValueError: a key that leads through something that is neither a mapping nor a list, or past a list's end.

    Example:
        >>> base = {"model": {"class_path": "M", "init_args": {"rewards": [{"class_path": "R"}]}}}
        >>> with_settings(base, {"model.rewards.0.weight": 2, "seed": 1})["model"]["init_args"]["rewards"]
        [{'class_path': 'R', 'init_args': {'weight': 2}}]
    """
    config: dict[str, Any] = copy.deepcopy(dict(base))
    for key, value in settings.items():
        place: Any = config
        *path, last = key.split(".")
        for part in path:
            place = _inside(place, part)
            inner = place.get(part) if isinstance(place, dict) else _item(place, part, key)
            if inner is None:
                inner = place[part] = {}
            place = inner
        place = _inside(place, last)
        if isinstance(place, dict):
            place[last] = copy.deepcopy(value)  # a later key may lead into it
        elif isinstance(place, list):
            _item(place, last, key)
            place[int(last)] = copy.deepcopy(value)
        else:
            raise ValueError(f"{key!r} leads through {place!r}, which has no parts to set.")
    return config


def with_options(
    base: Mapping[str, Any], arguments: Sequence[str], keys: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """A copy of a configuration with those options in it that give the place of a varied setting.

    On the command line they would take effect after the arm's settings: a class (``--model.optimizer={class_path:
    ...}``, ``--model.optimizer.class_path=...`` or its name alone), whose arguments the configuration may not have, its
    arguments as a mapping, or a list, which replaces the settings of its items. As on the command line, a class keeps
    those arguments of the one before that it takes as well.

    Args:
        base: the configuration.
        arguments: options of the runs.
        keys: the settings of an arm.

    Returns:
        The configuration, and the other options.

    Example:
        >>> with_options({"a": {"class_path": "A"}}, ["--a={class_path: B}", "--b=1"], ["a.init_args.size"])
        ({'a': {'class_path': 'B'}}, ['--b=1'])
        >>> with_options({"a": ["A"]}, ["--a+={class_path: B}"], ["a.1.init_args.size"])
        ({'a': ['A', {'class_path': 'B'}]}, [])
        >>> with_options({}, ["--a.class_path=m.B", "--a.init_args={b: 1}"], ["a.init_args.size"])
        ({'a': {'class_path': 'm.B', 'init_args': {'b': 1}}}, [])
    """
    config = copy.deepcopy(dict(base))
    others: list[str] = []
    varied = list(keys)
    for name, value, words in _options(arguments):
        place = name.rstrip("+")
        inside = any(is_part(key, place) for key in varied)
        found = _mapping_or_list(value)
        if inside and name.endswith("+"):
            item = value if found is None else found
            config = _appended(config, place, item if isinstance(item, list) else [item])
        elif inside and isinstance(found, dict) and "class_path" in found:
            config = with_settings(config, {place: replaced_class(_at(config, place), found)})
        elif inside and isinstance(found, list):
            config = with_settings(config, {place: found})
        elif (part := _part_of_class(name, value, varied)) and not isinstance(_at(config, part[0]), list):
            config = with_settings(config, {part[0]: _changed(_at(config, part[0]), part[1])})
        else:
            others += words
    return config, others


def _part_of_class(name: str, value: str, keys: Iterable[str]) -> tuple[str, dict[str, Any]] | None:
    """The setting of a class that has one of the keys, and what an option says of it: its path, or its arguments."""
    place, _, part = name.rpartition(".")
    found = _mapping_or_list(value)
    if part == "class_path" and value:
        given: dict[str, Any] = {"class_path": value}
    elif part == "init_args" and isinstance(found, dict):
        given = {"init_args": found}
    elif _CLASS.fullmatch(value) and isinstance(yaml.safe_load(value), str) and value != "None":
        place, given = name, {"class_path": value}
    else:
        return None
    within = [key_parts(key)[len(key_parts(place)) :] for key in keys if is_part(key, place)]
    return (place, given) if any(rest and _is_argument(rest[0]) for rest in within) else None


def _is_argument(part: str) -> bool:
    return part != "class_path" and not part.isdecimal()


def _changed(before: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A class with another path or with more arguments, as the command line's own options change it."""
    if "class_path" in given:
        return replaced_class(before, given)
    if not isinstance(before, dict):
        return given if before is None else {"class_path": before, **given}
    if not before.keys() & {"class_path", "init_args"}:
        return merged(before, given["init_args"])
    return {**before, "init_args": merged(before.get("init_args") or {}, given["init_args"])}


def _appended(config: dict[str, Any], place: str, items: list[Any]) -> dict[str, Any]:
    """A configuration with a longer list at a place that may have none yet, or one item without a list."""
    before = _at(config, place)
    before = before if isinstance(before, list) else [] if before is None else [before]
    return with_settings(config, {place: [*before, *items]})


def _at(config: dict[str, Any], key: str) -> Any:
    """The value of a dotted key, or None."""
    found: Any = config
    for part in key.split("."):
        if isinstance(found, list):
            found = found[int(part)] if part.isdecimal() and int(part) < len(found) else None
            continue
        found = _inside(found, part)
        found = found.get(part) if isinstance(found, dict) else None
    return found


def same_key(one: str, other: str) -> bool:
    """Whether two dotted keys name one setting, or one of them contains the other."""
    return is_part(one, other) or is_part(other, one)


def is_part(key: str, whole: str) -> bool:
    """Whether a dotted key names the setting ``whole`` or something in it."""
    parts = key_parts(whole)
    return key_parts(key)[: len(parts)] == parts


def key_parts(key: str) -> list[str]:
    """The parts of a dotted key. It may name ``init_args`` or omit them, and they are no part."""
    return [part for part in key.split(".") if part != "init_args"]


def given_besides(key: str, arguments: Sequence[str]) -> bool:
    """Whether a command line gives a setting its value. An appended item leaves the other items as they are.

    Example:
        >>> given_besides("a.0.size", ["--a=b.C"]), given_besides("a.0.size", ["--a+=b.C"])
        (True, False)
        >>> given_besides("a", ["--a+=b.C"]), given_besides("a.0.size", ["--a+={class_path: b.C}"])
        (True, False)
        >>> given_besides("a.size", ["--a=b.C"]), given_besides("a.size", ["--a=b"])
        (False, True)
    """
    for name, value, _ in _options(arguments):
        if name.endswith("+"):
            if is_part(name.rstrip("+"), key):
                return True
            continue
        part = _part_of_class(name, value, [key])
        names_class = part is not None and "class_path" in part[1]  # and none of its arguments
        if not names_class and any(same_key(key, leaf) for leaf in _leaves(name, value)):
            return True
    return False


def option_keys(arguments: Sequence[str]) -> list[str]:
    """The dotted keys that a command line sets, including those inside mappings.

    Example:
        >>> option_keys(["--trainer.max_steps=4", "--model.seed", "3", "--trainer.callbacks+=a.B"])
        ['trainer.max_steps', 'model.seed', 'trainer.callbacks']
        >>> option_keys(["--data={class_path: mine.Data, init_args: {seed: 1}}"])
        ['data.class_path', 'data.init_args.seed']
    """
    return [leaf for name, value, _ in _options(arguments) for leaf in _leaves(name.rstrip("+"), value)]


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Name and value of every option, and the words that it consists of. A word that belongs to none has no name."""
    index = 0
    while index < len(arguments):
        name, equals, value = arguments[index].removeprefix("--").partition("=")
        size = 1
        if not arguments[index].startswith("--"):
            name = ""
        elif not equals and index + 1 < len(arguments) and not arguments[index + 1].startswith("--"):
            value, size = arguments[index + 1], 2
        yield name, value, arguments[index : index + size]
        index += size


def _mapping_or_list(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text.lstrip().startswith(("{", "[")) else None
    except yaml.YAMLError:
        return None


def _leaves(key: str, text: str) -> list[str]:
    """The key of a value or, for a mapping, the keys inside it."""

    def below(prefix: str, part: Any) -> list[str]:
        if not isinstance(part, dict) or not part:
            return [prefix]
        return [leaf for name, inner in part.items() for leaf in below(f"{prefix}.{name}", inner)]

    return below(key, _mapping_or_list(text)) if key else []


def _inside(place: Any, part: str) -> Any:
    """Where ``part`` belongs: inside the ``init_args`` of a class where the class has them."""
    if isinstance(place, dict) and part not in place and part not in ("class_path", "init_args"):
        if "class_path" in place:
            return place.setdefault("init_args", {})
        return place.get("init_args", place)
    return place


def _item(place: Any, part: str, key: str) -> Any:
    if not isinstance(place, list) or not part.isdecimal() or int(part) >= len(place):
        size = f"a list of {len(place)}" if isinstance(place, list) else repr(place)
        raise ValueError(f"{key!r} asks for {part!r} of {size}. Give an existing key or index.")
    return place[int(part)]
