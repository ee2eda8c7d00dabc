"""Where problems come from: JSONL files, hub datasets, reasoning-gym tasks, built-in arithmetic."""

import json
import random
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lightning_lambdapo.data.presets import LONE_SURROGATE, PRESETS, Preset, RowError, is_chat, text_of
from lightning_lambdapo.functional.ranges import check_seed, check_whole, path_text

Row = dict[str, Any]

_FIELDS = ("prompt", "answer", "reference", "choices")
_SUBJECT = "subject"
_TERMS = range(1, 20)


@dataclass(frozen=True)
class DataSource:
    """One set of problems. Its origin is exactly one of ``path``, ``dataset``, ``task`` and a ``preset``'s own.

    Attributes:
        preset: named column mapping, with a hub id unless ``path`` or ``dataset`` overrides it. ``"arithmetic"`` is
            built in. See ``lightning_lambdapo.data.PRESETS``.
        path: a JSONL file, one object per line.
        dataset: a hub id, or a local directory that ``datasets.load_dataset`` reads.
        config: the hub dataset's configuration name.
        split: the split. A preset has a default.
        revision: branch, tag or commit of the hub dataset.
        columns: our name (``prompt``, ``answer``, ``reference``, ``choices``, ``subject``) -> the data's column name.
            Without a preset, those of the first four that are not mapped are read from columns of the same name.
            Evaluations are broken down by ``subject``.
        limit: number of rows to keep, from the first.
        task: name of a reasoning-gym task.
        settings: that task's settings.
        size: number of generated problems (reasoning-gym, arithmetic).
        seed: seed of the generated problems.
    """

    preset: str | None = None
    path: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    task: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("path", "dataset"):
            object.__setattr__(self, name, path_text(getattr(self, name)))
        if self.preset is not None and self.preset not in PRESETS and self.preset != "arithmetic":
            raise ValueError(f"Unknown preset {self.preset!r}. There are {', '.join(['arithmetic', *PRESETS])}.")
        origins = [name for name in ("path", "dataset", "task") if getattr(self, name) is not None]
        if len(origins) > 1 or (not origins and self.preset is None):
            raise ValueError(
                f"A data source needs exactly one origin, got {' and '.join(origins) or 'none'}. Give `path`, "
                "`dataset`, `task` or a `preset`."
            )
        generated = self.generated
        if generated and self.task is not None and self.preset is not None:
            raise ValueError(f"`task` ({self.task}) takes no `preset` ({self.preset}). Drop one of them.")
        if self.preset == "arithmetic" and origins:
            raise ValueError(f"The preset arithmetic is generated and takes no `{origins[0]}`.")
        idle = {
            "config": self.path is not None or generated,
            "revision": self.path is not None or generated,
            "columns": generated,
            "settings": self.task is None,
            "size": not generated,
            "seed": not generated,
        }
        for name, is_idle in idle.items():
            if is_idle and getattr(self, name) not in (None, {}, 0):
                raise ValueError(f"`{name}` = {getattr(self, name)!r} has no effect on this data source. Drop it.")
        strangers = set(self.columns) - {*_FIELDS, _SUBJECT}
        if strangers:
            raise ValueError(
                f"`columns` maps {', '.join(_FIELDS)}, {_SUBJECT}. It cannot map {', '.join(sorted(strangers))}."
            )
        for name in ("limit", "size"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_seed("seed", self.seed)

    @property
    def generated(self) -> bool:
        """True where problems are generated from a seed, not read."""
        return self.task is not None or self.preset == "arithmetic"

    @property
    def name(self) -> str:
        """The name of this source in messages."""
        return self.path or self.dataset or self.task or str(self.preset)


def load_rows(source: DataSource) -> list[Row]:
    """Load a source.

    Returns:
        Rows with ``prompt`` (text or chat messages), ``answer`` and ``reference`` (text or None), ``prompt_id`` (the
        row's index in its origin), and every other column of the data as it is.

    Raises:
        ValueError: a row cannot be read. Names its file and line, or its dataset and row.
        ImportError: a reasoning-gym task without the package.
    """
    if source.preset == "arithmetic":
        rows = _numbered(arithmetic_rows(source.split or "train", size=source.size, seed=source.seed))
    elif source.task is not None:
        rows = _numbered(_reasoning_gym_rows(source))
    else:
        preset = PRESETS[source.preset] if source.preset is not None else Preset()
        raw = jsonl_rows(source.path) if source.path is not None else _hub_rows(source, preset)
        rows = (_convert(row, index, where, source, preset) for index, (where, row) in enumerate(raw))
    kept = [row for _, row in zip(range(source.limit), rows, strict=False)] if source.limit else list(rows)
    if not kept:
        raise ValueError(f"The data source {source.name} has no rows.")
    return kept


def arithmetic_prompt(*terms: int) -> str:
    """The built-in task's prompt.

    Example:
        >>> arithmetic_prompt(1, 2, 3)
        '1+2+3='
    """
    return "+".join(map(str, terms)) + "="


def arithmetic_solution(*terms: int, slip: Callable[[], int] = lambda: 0) -> str:
    """The built-in task's worked solution, from left to right. ``slip`` draws the error of each result.

    Example:
        >>> arithmetic_solution(1, 2, 3)
        '1+2=3,3+3=6;6'
    """
    steps, total = [], terms[0]
    for term in terms[1:]:
        result = max(total + term + slip(), 0)
        steps.append(f"{total}+{term}={result}")
        total = result
    return f"{','.join(steps)};{total}"


def arithmetic_rows(split: str, *, size: int | None = None, seed: int = 0) -> list[Row]:
    """Sums of three terms from 1 to 19, each sum once. A tenth of all 6,859 is the split ``"test"``.

    Args:
        split: ``"train"`` or ``"test"``. For one seed they have no sum in common.
        size: number of rows. None means all of the split.
        seed: seed of the order.

    Raises:
        ValueError: unknown split, or more rows than there are.
    """
    if split not in ("train", "test"):
        raise ValueError(f"The arithmetic task has the splits train and test, not {split!r}.")
    triples = [(a, b, c) for a in _TERMS for b in _TERMS for c in _TERMS]
    random.Random(seed).shuffle(triples)  # noqa: S311
    held_out = len(triples) // 10
    chosen = triples[:held_out] if split == "test" else triples[held_out:]
    if size is not None and size > len(chosen):
        raise ValueError(f"The arithmetic task's split {split} has {len(chosen)} sums, fewer than size = {size}.")
    return [
        {"prompt": arithmetic_prompt(*terms), "answer": str(sum(terms)), "reference": arithmetic_solution(*terms)}
        for terms in chosen[:size]
    ]


def _numbered(rows: list[Row]) -> Iterator[Row]:
    return ({**row, "prompt_id": index} for index, row in enumerate(rows))


def _reasoning_gym_rows(source: DataSource) -> list[Row]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"The task {source.task!r} needs reasoning-gym: pip install 'lightning-lambdapo[reasoning-gym]'."
        ) from error
    try:
        dataset = reasoning_gym.create_dataset(
            source.task, size=source.size or 500, seed=source.seed, **source.settings
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym cannot make the task {source.task!r}: {error}") from error
    return [
        {
            "prompt": entry["question"],
            "answer": text_of(entry["answer"]),
            "reference": None,
            "metadata": entry["metadata"],
        }
        for entry in dataset
    ]


def jsonl_rows(path: str, *, unfinished: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Objects of a JSONL file, each with its file and line.

    Args:
        path: the file.
        unfinished: omit a last line without an end: somebody is still writing it.

    Raises:
        ValueError: a line cannot be read. Names the file and line.
    """
    try:
        file = Path(path).expanduser().open("rb")
    except (OSError, ValueError, RuntimeError) as error:  # null bytes, or no home directory
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"The data file {path!r} cannot be read: {reason}.") from error
    with file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                if unfinished and not line.endswith(b"\n"):
                    return
                raise ValueError(f"{where} is not valid JSON: {error}. Each line must be one whole object.") from error
            except RecursionError as error:
                raise ValueError(f"{where} is nested too deeply to be read. Flatten it.") from error
            except ValueError as error:
                raise ValueError(
                    f"{where} holds a whole number of more than {sys.get_int_max_str_digits()} digits. Write it as "
                    "text."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} holds {type(row).__name__}, not an object with named columns.")
            yield where, row


def _hub_rows(source: DataSource, preset: Preset) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    name, split = source.dataset or preset.dataset, source.split or preset.split
    if name is None:
        raise ValueError(f"The preset {source.preset} has no hub dataset of its own. Give `path` or `dataset`.")
    try:
        dataset = datasets.load_dataset(name, source.config or preset.config, split=split, revision=source.revision)
    except (ValueError, OSError) as error:
        raise ValueError(f"The dataset {name} (split {split}) cannot be loaded: {error}") from error
    if isinstance(dataset, dict):
        raise ValueError(f"The dataset {name} has the splits {', '.join(map(str, dataset))}. Choose one with `split`.")
    return ((f"{name}, split {split}, row {index}", row) for index, row in enumerate(dataset))


def _convert(row: Mapping[str, Any], index: int, where: str, source: DataSource, preset: Preset) -> Row:
    own = {name: column for name, column in source.columns.items() if name != _SUBJECT}
    columns = {**preset.columns, **own}
    if source.preset is None:  # fields that are not mapped are read under their own name
        columns |= {name: name for name in _FIELDS if name in row and name not in {*own, *own.values()}}
    subject = source.columns.get(_SUBJECT) or next((name for name in preset.subjects if name in row), None)
    missing = [name for name in (*columns.values(), *([subject] if subject else [])) if name not in row]
    if missing or "prompt" not in columns:
        raise ValueError(
            f"{where} has no column {', '.join(map(repr, missing)) or repr('prompt')}. It has "
            f"{', '.join(map(repr, row))}. Name the columns with `columns: {{prompt: ..., answer: ...}}`."
        )
    try:
        fields = preset.finish({name: row[column] for name, column in columns.items()}, row)
        result: Row = {"prompt": _prompt_of(fields["prompt"])}
        for name in ("answer", "reference"):
            result[name] = text_of(fields.get(name))
    except RowError as error:
        raise ValueError(
            f"{where} does not fit{f' the preset {source.preset}' * bool(source.preset)}: {error}"
        ) from error
    others = {name: value for name, value in row.items() if name not in ("prompt", "answer", "reference", "prompt_id")}
    labelled = {_SUBJECT: row[subject]} if subject else {}
    return {**others, **labelled, **result, "prompt_id": index}


def _prompt_of(value: object) -> str | list[dict[str, str]]:
    if isinstance(value, str) and value.strip():
        texts = [value]
    elif isinstance(value, list) and is_chat(value):
        texts = [message["content"] for message in value]
    else:
        raise RowError(f"the prompt must be a non-empty text or a list of chat messages, got {reprlib.repr(value)}")
    if any(map(LONE_SURROGATE.search, texts)):
        raise RowError("the prompt has half of a surrogate pair (\\ud800 to \\udfff), which no tokenizer accepts")
    return cast(str | list[dict[str, str]], value)
