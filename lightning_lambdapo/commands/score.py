"""``lambdapo score FILE``: judge completions again, without a model, with the report of ``lambdapo test``."""

import argparse
import importlib
import reprlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from lightning_lambdapo.config import changed_settings
from lightning_lambdapo.data.presets import PRESETS, RowError, is_chat, text_of
from lightning_lambdapo.data.sources import DataSource, Row, jsonl_rows, load_rows
from lightning_lambdapo.evaluation.results import Outcome, Results, markdown, outcome, results, write
from lightning_lambdapo.functional.ranges import home_path
from lightning_lambdapo.rewards import AccuracyReward, Reward, RewardInputs, as_rewards
from lightning_lambdapo.rewards.judging import judge
from lightning_lambdapo.rewards.verifier.extraction import AnswerFormat

_DESCRIPTION = """\
Judge a JSONL file of completions, and report accuracy with bootstrap intervals over prompts, also by subject if there
are any. FILE is predictions.jsonl of `lambdapo predict`, completions.jsonl of a training run, or any file with
`prompt`, `completion` and `answer` in each line. `prompt_id`, `subject`, `reference`, `truncated` and
`completion_length` are used if they are given. Lines with the same prompt_id, or else the same prompt, are samples of
one prompt. The report goes to FILE's name with .results.json and .results.md. Nothing is overwritten."""
_TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "completion": (str,),
    "prompt_id": (int, str),
    "truncated": (bool,),
    "completion_length": (int,),
    "columns": (dict,),
}
_NAMES = {str: "a text", int: "a whole number", bool: "true or false", dict: "an object with named columns"}
_OWN = ("prompt", "completion", "answer", "reference", "prompt_id", "truncated", "completion_length", "columns")


@dataclass(frozen=True, slots=True)
class Completion:
    """One line of a file of completions.

    Attributes:
        where: file and line.
        prompt_id: identity of the prompt, None if the file has none.
        prompt: the prompt of the policy.
        completion: the policy's completion.
        answer: the gold answer, None if the line has none.
        reference: a reference solution, None if the line has none.
        length: length of the completion in tokens, None if the line has none.
        truncated: whether the completion was truncated, None if the line does not say.
        columns: all other columns, for the rewards.
    """

    where: str
    prompt_id: int | str | None
    prompt: str
    completion: str
    answer: str | None
    reference: str | None
    length: int | None
    truncated: bool | None
    columns: dict[str, Any]

    @property
    def key(self) -> int | str:
        """The key that all samples of one prompt share."""
        return self.prompt if self.prompt_id is None else self.prompt_id


def main(args: list[str]) -> None:
    """Run ``lambdapo score``.

    Args:
        args: the command line, without the program and ``score``.
    """
    parser = _parser()
    given = parser.parse_args(args)
    try:
        source = None
        if given.preset is not None:
            source = DataSource(preset=given.preset, path=given.path, split=given.split)
        elif given.path is not None or given.split is not None:
            raise ValueError("--path and --split say where the data of --preset is, so give --preset too.")
        rewards = [AccuracyReward(answer_format=given.format), *map(_load_reward, given.reward)]
        found = score_file(given.file, rewards, source=source, k=given.k)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    except RuntimeError as error:  # a reward's
        if not isinstance(error.__cause__, ValueError):
            raise
        parser.error(str(error))
    file = given.file
    files = write(found, file.parent if given.output is None else given.output, f"{file.stem}.results")
    sys.stdout.write(f"{markdown(found)}\nWritten to {files[0]} and {files[1]}\n")


def score_file(
    file: str | Path, rewards: Sequence[Any], *, source: DataSource | None = None, k: Sequence[int] | None = None
) -> Results:
    """Judge a file of completions.

    Args:
        file: a JSONL file, see the help of ``lambdapo score``.
        rewards: the judges. The first one must be called ``accuracy``, and gives verdicts and votes.
        source: the data set whose answers replace those of the file.
        k: numbers of samples for pass@k and maj@k. None uses 1 and the number that every prompt has.

    Returns:
        As :func:`~lightning_lambdapo.results.results`.

    Raises:
        ValueError: a line cannot be read, has no answer, or does not fit the others. The message names file and line.
        RuntimeError: a reward failed.
    """
    judges = as_rewards(rewards)
    rows = read_completions(file)
    if source is not None:
        rows = _with_gold(rows, source)
    elif all(row.answer is None for row in rows):
        raise ValueError(
            f"{rows[0].where} has no `answer`, and neither has any other line. Add them, or name the data set that has "
            "them with --preset."
        )
    groups: dict[int | str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.key, []).append(index)
    for members in groups.values():
        _check_group([rows[index] for index in members])
    try:
        outcomes = _judge(rows, judges, list(groups.values()))
    finally:
        for each in judges:
            each.close()
    fewest = min(map(len, groups.values()))
    if any(number < 1 for number in k or ()):
        raise ValueError(f"--k must be at least 1, got {', '.join(map(str, k or ()))}.")
    steps = [row.columns["step"] for row in rows if isinstance(row.columns.get("step"), int)]
    settings = {
        "stage": Path(file).name,
        "file": str(file),
        "training_steps": f"{min(steps)} to {max(steps)}, whose policies differ" if steps else None,
        "answers_of": None if source is None else changed_settings(source),
        "answer_format": getattr(judges[0], "answer_format", None),
        "versions": {"lightning-lambdapo": version("lightning-lambdapo")},
    }
    return results(outcomes, sorted({1, fewest} if k is None else {*k}), settings)


def read_completions(file: str | Path) -> list[Completion]:
    """The lines of a file of completions.

    Raises:
        ValueError: a line cannot be read, or the file has none. The message names file and line.
    """
    rows = []
    for where, row in jsonl_rows(str(file)):
        try:
            rows.append(_completion(where, row))
        except RowError as error:
            raise ValueError(f"{where}: {error}.") from error
    if not rows:
        raise ValueError(f"{file} has no lines.")
    return rows


def _completion(where: str, row: Any) -> Completion:
    for name in ("prompt", "completion"):
        if name not in row:
            raise RowError(f"it has no `{name}`. It has {', '.join(map(repr, row))}")
    prompt = row["prompt"]
    if is_chat(prompt):
        prompt = "\n\n".join(message["content"] for message in prompt)
    for name, kinds in _TYPES.items():
        value = prompt if name == "prompt" else row.get(name)
        if type(value) not in kinds and (value is not None or name in ("prompt", "completion")):
            wanted = " or ".join(_NAMES[kind] for kind in kinds)
            raise RowError(f"its `{name}` must be {wanted}, got {reprlib.repr(value)}")
    others = {name: value for name, value in row.items() if name not in _OWN}
    return Completion(
        where=where,
        prompt_id=row.get("prompt_id"),
        prompt=prompt,
        completion=row["completion"],
        answer=text_of(row.get("answer")) or None,
        reference=text_of(row.get("reference")),
        length=row.get("completion_length"),
        truncated=row.get("truncated"),
        columns=others | (row.get("columns") or {}),
    )


def _with_gold(rows: Sequence[Completion], source: DataSource) -> list[Completion]:
    """The rows with answers, references and columns of a data set, found by id (or text) and compared with it."""
    data = load_rows(source)
    by_id = {row["prompt_id"]: row for row in data}
    by_text = {_question(row): row for row in data}
    found = []
    for row in rows:
        gold = by_text.get(_flat(row.prompt)) if row.prompt_id is None else by_id.get(row.prompt_id)
        if gold is None:
            what = "prompt" if row.prompt_id is None else f"prompt with prompt_id {row.prompt_id}"
            raise ValueError(
                f"{row.where}: {source.name} ({len(data)} rows) has no such {what}. Choose the --preset, --path and "
                "--split that the completions are of."
            )
        if _question(gold) not in _flat(row.prompt):
            raise ValueError(
                f"{row.where}: its prompt is not that of prompt_id {row.prompt_id} in {source.name}, "
                f"{_question(gold)!r:.80}. Choose the --preset, --path and --split that the completions are of."
            )
        columns = {name: value for name, value in gold.items() if name not in _OWN}
        found.append(replace(row, answer=gold["answer"], reference=gold["reference"], columns=row.columns | columns))
    return found


def _question(row: Row) -> str:
    prompt = row["prompt"]
    return _flat(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def _flat(text: str) -> str:
    return " ".join(text.split())


def _check_group(rows: Sequence[Completion]) -> None:
    first = rows[0]
    for row in rows:
        for name in ("prompt", "answer"):
            if getattr(row, name) != getattr(first, name):
                raise ValueError(
                    f"{row.where}: prompt_id {row.prompt_id} has the {name} {getattr(row, name)!r:.80}, and "
                    f"{getattr(first, name)!r:.80} in {first.where}. Put completions of different data into different "
                    "files."
                )


def _judge(rows: Sequence[Completion], judges: Sequence[Reward], groups: Sequence[Sequence[int]]) -> list[Outcome]:
    """The outcome of each group of rows."""
    inputs = RewardInputs(
        prompts=[row.prompt for row in rows],
        completions=[row.completion for row in rows],
        answers=[row.answer for row in rows],
        references=[row.reference for row in rows],
        completion_lengths=_known(rows, "completion_length", [row.length for row in rows]),
        truncated=_known(rows, "truncated", [row.truncated for row in rows]),
        columns=[row.columns for row in rows],
    )
    parts = {name: part.flatten().tolist() for name, part in judge(judges, inputs, group_size=1).parts.items()}
    outcomes = []
    for number, members in enumerate(groups):
        some = [rows[index] for index in members]
        lengths, truncated = [row.length for row in some], [row.truncated for row in some]
        outcomes.append(
            outcome(
                number if some[0].prompt_id is None else some[0].prompt_id,
                subject=some[0].columns.get("subject"),
                parts={name: [part[index] for index in members] for name, part in parts.items()},
                votes=[judges[0].vote(row.completion) for row in some],
                lengths=None if None in lengths else [length or 0 for length in lengths],
                truncated=None if None in truncated else [bool(cut) for cut in truncated],
            )
        )
    return outcomes


class _Unknown(list[Any]):
    """A column that the file lacks. Reading it in a reward is an error."""

    def __init__(self, where: str, column: str, rows: int) -> None:
        super().__init__([None] * rows)
        self.missing = f"{where} has no `{column}`, which the reward reads"

    def __copy__(self) -> "_Unknown":
        return self

    def __iter__(self) -> Iterator[Any]:
        raise ValueError(self.missing)

    def __getitem__(self, index: Any) -> Any:
        raise ValueError(self.missing)

    def __contains__(self, value: Any) -> bool:
        raise ValueError(self.missing)

    def count(self, value: Any) -> int:
        """Raise too."""
        raise ValueError(self.missing)


def _known(rows: Sequence[Completion], column: str, values: list[Any]) -> list[Any]:
    return _Unknown(rows[values.index(None)].where, column, len(rows)) if None in values else values


def _load_reward(name: str) -> Any:
    """A reward function, or an object of a reward class that needs no arguments, by its import path."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "lightning_lambdapo.rewards"), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--reward {name} cannot be imported ({error}). Give module.name, and set PYTHONPATH if the "
            "module is not installed."
        ) from error
    if not isinstance(found, type):
        return found
    try:
        made = found()
    except TypeError as error:
        raise ValueError(f"--reward {name} needs arguments ({error}). Give a function that fills them in.") from error
    if getattr(made, "needs_encoder", False):
        raise ValueError(f"--reward {name} needs the policy's embeddings, but score loads no model. Omit it.")
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lambdapo score", description=_DESCRIPTION)
    parser.add_argument("file", type=home_path, metavar="FILE", help="JSONL of completions")
    parser.add_argument("--preset", choices=["arithmetic", *PRESETS], help="take the gold answers from this data set")
    parser.add_argument("--path", help="JSONL file with the preset's data, in place of the hub")
    parser.add_argument("--split", help="split of the preset's data")
    parser.add_argument("--k", type=int, nargs="+", help="numbers of samples for pass@k and maj@k")
    parser.add_argument("--format", choices=get_args(AnswerFormat), default="auto", help="format of the answers")
    parser.add_argument("--output", type=home_path, help="directory of the report (default: that of FILE)")
    parser.add_argument(
        "--reward",
        nargs="+",
        default=[],
        metavar="CLASS_OR_FUNCTION",
        help="further rewards to report, such as FormatReward or my_module.my_function",
    )
    return parser
