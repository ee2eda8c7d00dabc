"""Command lines and configurations of release 0.1, as this release has them."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lightning_lambdapo.checkpointing.release_0_1 import MOVED_SETTINGS, upgraded
from lightning_lambdapo.functional.ranges import home_path

_CONFIG = ("--config", "-c")
_COMMANDS = ("fit", "validate", "test", "predict")


def upgraded_arguments(args: Sequence[str]) -> list[str]:
    """A command line whose switches are where this release has them, in its options and in its configurations.

    Example:
        >>> upgraded_arguments(["fit", "--model.rollout.compaction=false"])
        ['fit', '--model.performance.compaction=false']
        >>> upgraded_arguments(["fit", "--model.rollout={group_size: 4, compaction: false}"])
        ['fit', '--model.rollout={group_size: 4}', '--model.performance.compaction=false']
    """
    found: list[str] = []
    waiting = list(args)
    while waiting:
        option, equals, value = waiting.pop(0).partition("=")
        if not equals and waiting and (option in _CONFIG or option.startswith("--model")):
            given, *more = _upgraded_option(option, waiting.pop(0))
            found += [*given, *more]
        elif equals:
            (name, content), *more = _upgraded_option(option, value)
            found += [f"{name}={content}", *more]
        else:
            found.append(option)
    return found


def upgraded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the module's switches where this release has them."""
    found = dict(config)
    for command in _COMMANDS:  # a configuration of all commands has a section for each
        if isinstance(found.get(command), Mapping):
            found[command] = upgraded_config(found[command])
    if "model" in found:
        model = _loaded(found["model"])
        if isinstance(model, Mapping):
            new = _upgraded_model(model)
            found["model"] = found["model"] if new == model else new
    return found


def _upgraded_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The module's settings, with or without a ``class_path`` around them."""
    if "class_path" in model or "init_args" in model:
        arguments = _loaded(model.get("init_args") or {})
        return {**model, "init_args": _upgraded_model(arguments)} if isinstance(arguments, Mapping) else dict(model)
    sections = {name: _loaded(model[name]) for name in ("rollout", "policy") if name in model}
    inlined = {name: content for name, content in sections.items() if isinstance(content, Mapping)}
    new = upgraded({**model, **inlined})
    return dict(model) if new == {**model, **inlined} else new


def _upgraded_option(option: str, value: str) -> tuple[tuple[str, str], *tuple[str, ...]]:
    """The option with its value, and further arguments for what has moved out of the value."""
    if option in _CONFIG:
        config = _loaded(value)
        new = upgraded_config(config) if isinstance(config, Mapping) else config
        return ((option, value if new == config else yaml.safe_dump(new, sort_keys=False)),)
    prefix = next((p for p in ("--model.init_args", "--model") if option == p or option.startswith(f"{p}.")), None)
    if prefix is None:
        return ((option, value),)
    path = option[len(prefix) + 1 :].replace(".init_args.", ".")
    if path in MOVED_SETTINGS:
        return ((f"{prefix}.performance.{MOVED_SETTINGS[path]}", value),)
    content = _loaded(value) if path in ("", "rollout", "policy") else None
    if not isinstance(content, Mapping):
        return ((option, value),)
    new = _upgraded_model({path: content} if path else content)
    if path:
        moved, rest = new.get("performance", {}), new[path]
        further = [f"{prefix}.performance.{name}={_flow(setting)}" for name, setting in moved.items()]
        return ((option, _flow(rest) if moved else value), *further)
    return ((option, value if new == content else _flow(new)),)


def _flow(content: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(content, default_flow_style=True, sort_keys=False, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def _loaded(value: Any) -> Any:
    """A mapping that is given as such, as YAML, or by a file's name. Anything else is left to the parser."""
    if not isinstance(value, str):
        return value
    try:
        file = home_path(value)
        return yaml.safe_load(file.read_text(encoding="utf-8") if file.is_file() else value)
    except (OSError, ValueError, yaml.YAMLError):
        return value
