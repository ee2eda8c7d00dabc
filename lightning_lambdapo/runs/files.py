"""Reading a run's files: its directory, settings, logged values and completions."""

import csv
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_lambdapo.checkpointing.release_0_1 import upgraded
from lightning_lambdapo.data.sources import jsonl_rows

Record = dict[str, Any]

#: A run's checkpoints. One whose name has a logged value such as ``val/reward`` is in a directory of its own.
CHECKPOINTS = "checkpoints/**/*.ckpt"


class RunFileError(ValueError):
    """A command cannot use a run's files. The message names the file and says what to do."""


def find_run(path: Path, wanted: str) -> Path:
    """The run at ``path``: the directory itself, or the newest run below it that has the wanted files.

    Args:
        path: a run's directory, a directory of versions (``lightning_logs``), or a directory that contains one. Loggers
            other than Lightning's own name versions and the directory in their own way.
        wanted: pattern of the files that the run must have.

    Raises:
        RunFileError: there is no such directory, or no such run in it.
    """
    if not path.is_dir():
        raise RunFileError(f"There is no directory {path}. Give that of a run, such as lightning_logs/version_0.")
    below = [*versions(path), *versions(path / "lightning_logs")]
    for candidate in (path, *below):
        if next(candidate.glob(wanted), None) is not None:
            return candidate
    named = [(file, run) for depth in ("*", "*/*") for run in path.glob(depth) for file in run.glob(wanted)]
    if named:
        return max(named, key=lambda pair: pair[0].stat().st_mtime)[1]
    places = f"{path} and its {len(below)} versions have" if below else f"{path} has"
    raise RunFileError(
        f"{places} no {wanted.replace('**/', '')}. Give the directory of a run that does, such as "
        "lightning_logs/version_0."
    )


def read_config(run: Path) -> Record | None:
    """The run's ``config.yaml``, as the command line wrote it. None if there is none."""
    file = run / "config.yaml"
    return load_yaml(file) if file.is_file() else None


def load_yaml(file: Path) -> Record:
    """Read a YAML file that contains a mapping.

    Raises:
        RunFileError: the file is missing, or contains something else.
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
    """Arguments of ``model`` or ``data`` in a run's settings, with or without ``class_path``."""
    found = (config or {}).get(name) or {}
    arguments = found.get("init_args") or {} if found.keys() & {"class_path", "init_args"} else found
    return upgraded(arguments) if name == "model" else dict(arguments)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.csv`` without empty fields. An empty list if there is no such file.

    Rows of ``metrics-1.csv`` and so on come before them: these were ``metrics.csv`` when a run was resumed.
    """
    numbered = [(int(match[1]), file) for file in run.glob("metrics-*.csv") if (match := _EARLIER.match(file.name))]
    files = [file for _, file in sorted(numbered)] + [run / "metrics.csv"]
    rows = []
    for file in filter(Path.is_file, files):
        with file.open(newline="", encoding="utf-8") as stream:
            rows += [
                {name: float(value) for name, value in row.items() if name and value} for row in csv.DictReader(stream)
            ]
    return rows


def first_and_last(values: Sequence[float]) -> tuple[float, float] | None:
    """Means over the first and the last tenth of the steps, rounded up. None without a finite value.

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


def read_training_completions(file: Path) -> Iterator[tuple[str, Record]]:
    """Records of a run's file of completions, each with its file and line.

    An incomplete last line is omitted, because its run was interrupted or is still writing.

    Raises:
        ValueError: a line is no record of a training step.
    """
    for where, record in jsonl_rows(str(file), unfinished=True):
        if not isinstance(record.get("step"), int):
            raise RunFileError(f"{where} is no completion of a training step: it has no `step`.")
        yield where, dict(record)


def unused_path(wanted: Path, *suffixes: str) -> Path:
    """``wanted``, or the first of ``wanted-1``, ``wanted-2``, ... that does not exist: nothing is overwritten.

    Args:
        wanted: a file or directory. Its parent directory is created.
        suffixes: suffixes of files beside it that must not exist either.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    names = (wanted if number == 0 else wanted.with_stem(f"{wanted.stem}-{number}") for number in itertools.count())
    return next(path for path in names if not any(p.exists() for p in (path, *map(path.with_suffix, suffixes))))


def versions(directory: Path) -> list[Path]:
    """The versions in a directory of runs, the newest first."""
    numbered = [(int(match[1]), path) for path in directory.glob("version_*") if (match := _VERSION.match(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


_VERSION = re.compile(r"version_(\d+)$")
_EARLIER = re.compile(r"metrics-(\d+)\.csv$")
