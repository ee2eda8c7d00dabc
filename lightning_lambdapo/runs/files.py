"""Reading what a run has left behind: its directory, settings, logged values and completions."""

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]


class RunFileError(ValueError):
    """Something about a run's files that keeps a command from working; says which file, and what to do."""


def find_run(path: Path, wanted: str) -> Path:
    """The run that ``path`` means: itself, or the newest below it that has what is wanted.

    Args:
        path: a run's directory, a directory of versions (``lightning_logs``), or one that has such a directory.
        wanted: pattern of the files that the run must have.

    Raises:
        RunFileError: there is no such directory, or no such run in it.
    """
    if not path.is_dir():
        raise RunFileError(f"There is no directory {path}; give that of a run, such as lightning_logs/version_0.")
    below = [*versions(path), *versions(path / "lightning_logs")]
    for candidate in (path, *below):
        if next(candidate.glob(wanted), None) is not None:
            return candidate
    places = f"{path} and its {len(below)} versions have" if below else f"{path} has"
    raise RunFileError(
        f"{places} no {wanted}; give the directory of a run that does, such as lightning_logs/version_0."
    )


def read_config(run: Path) -> Record | None:
    """The run's ``config.yaml``, as the command line wrote it; None where there is none."""
    file = run / "config.yaml"
    return load_yaml(file) if file.is_file() else None


def load_yaml(file: Path) -> Record:
    """A YAML file that holds a mapping.

    Raises:
        RunFileError: it is missing, or holds something else.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFileError(f"{file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFileError(f"{file} is not YAML and cannot be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(found, dict):
        raise RunFileError(f"{file} holds {type(found).__name__}, not the settings of a run: it is not a mapping.")
    return found


def section(config: Mapping[str, Any] | None, name: str) -> Record:
    """Arguments of ``model`` or ``data`` in a run's settings, with or without a ``class_path`` around them."""
    found = (config or {}).get(name) or {}
    arguments = found.get("init_args") or {} if found.keys() & {"class_path", "init_args"} else found
    return dict(arguments)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.csv``, without their empty fields; none where there is no such file."""
    file = run / "metrics.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [{name: float(value) for name, value in row.items() if name and value} for row in csv.DictReader(stream)]


def first_and_last(values: Sequence[float]) -> tuple[float, float] | None:
    """Means over the first and the last tenth of the steps, rounded up; None without a finite value.

    Example:
        >>> first_and_last([1.0, 2.0, 3.0])
        (1.0, 3.0)
        >>> first_and_last([float(step) for step in range(21)])
        (1.0, 19.0)
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    count = math.ceil(len(finite) / 10)
    return sum(finite[:count]) / count, sum(finite[-count:]) / count


def read_completions(file: Path) -> Iterator[tuple[int, Record]]:
    """Line numbers and records of a file of completions.

    A last line without an end is left out: its run was interrupted, or is still writing.

    Raises:
        RunFileError: a line that is no record of a training step.
    """
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise RunFileError(f"{file}, line {number}, is not JSON ({error}); delete or mend it.") from error
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise RunFileError(f"{file}, line {number}, is no completion of a training step: it has no `step`.")
            yield number, record


def versions(directory: Path) -> list[Path]:
    """The versions in a directory of runs, the newest first."""
    numbered = [(int(match[1]), path) for path in directory.glob("version_*") if (match := _VERSION.match(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


_VERSION = re.compile(r"version_(\d+)$")
