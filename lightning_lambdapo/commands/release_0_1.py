"""Conversion of command lines and configurations of release 0.1."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_lambdapo.config import MOVED_SETTINGS, upgraded


def upgraded_arguments(args: Sequence[str]) -> list[str]:
    """A command line of release 0.1 for this release. Options and configuration files are converted.

    Example:
        >>> upgraded_arguments(["fit", "--model.rollout.compaction=false"])
        ['fit', '--model.performance.compaction=false']
    """
    found: list[str] = []
    for argument in args:
        option, equals, value = argument.partition("=")
        if found and found[-1] in ("--config", "-c"):
            found.append(_upgraded_file(argument))
        elif option in ("--config", "-c") and equals:
            found.append(f"{option}={_upgraded_file(value)}")
        else:
            found.append(_upgraded_option(option) + equals + value)
    return found


def upgraded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of release 0.1 for this release."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        return dict(config)
    arguments = model.get("init_args")
    model = {**model, "init_args": upgraded(arguments)} if isinstance(arguments, Mapping) else upgraded(model)
    return {**config, "model": model}


def _upgraded_option(option: str) -> str:
    for prefix in ("--model.init_args.", "--model."):
        name = option.removeprefix(prefix).replace(".init_args.", ".")
        if option.startswith(prefix) and name in MOVED_SETTINGS:
            return f"{prefix}performance.{MOVED_SETTINGS[name]}"
    return option


def _upgraded_file(value: str) -> str:
    """The file's name, or its upgraded content if that differs. The parser reports files that cannot be read."""
    try:
        config = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return value
    if not isinstance(config, dict) or (new := upgraded_config(config)) == config:
        return value
    return yaml.safe_dump(new, sort_keys=False)
