"""Results of an evaluation: outcomes of single prompts, statistics with intervals, JSON and Markdown."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lambdapo.evaluation.estimators import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    estimate,
    majority_is_right,
    pass_at_k,
)
from lightning_lambdapo.runs.files import unused_path
from lightning_lambdapo.runs.text import markdown_table, metric_label

Results = dict[str, Any]

NO_SUBJECT = "(none)"
_NOTE = (
    "Intervals: percentile bootstrap over prompts, {resamples:,} resamples. An interval of no width says that the "
    "prompts agree, not that the value is certain."
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one prompt's samples. It is small, because outcomes cross ranks and are kept to the end.

    Attributes:
        prompt_id: stable identity of the prompt.
        subject: key of the breakdown by subject. None if the data has none.
        correct: whether each sample is correct. None if the prompt could not be judged.
        votes: each sample's final answer as the index of its first appearance among them, None without one.
        lengths: completion lengths in tokens. None if they are unknown.
        truncated: whether each completion reached the longest length. None if that is unknown.
        rewards: sum of each reward part over the samples it applies to, and their number.
    """

    prompt_id: int | str
    subject: str | None
    correct: list[bool] | None
    votes: list[int | None]
    lengths: list[int] | None
    truncated: list[bool] | None
    rewards: dict[str, tuple[float, int]]

    @property
    def samples(self) -> int:
        """Number of completions."""
        return len(self.votes)


def outcome(
    prompt_id: int | str,
    *,
    subject: object,
    parts: Mapping[str, Sequence[float]],
    votes: Sequence[str | None],
    lengths: list[int] | None,
    truncated: list[bool] | None,
) -> Outcome:
    """The outcome of one prompt.

    Args:
        prompt_id: stable identity of the prompt.
        subject: text or a number. Anything else is no subject.
        parts: each reward's value of every sample, NaN where it is not applicable. A sample is correct if the part
            ``accuracy`` exceeds 0.5. If that part is missing for any sample, the prompt is not judged.
        votes: each sample's final answer in a canonical form.
        lengths: completion lengths in tokens.
        truncated: whether each completion reached the longest length.
    """
    accuracy = parts.get("accuracy", [math.nan])
    order = list(dict.fromkeys(vote for vote in votes if vote is not None))
    known = isinstance(subject, str | int | float) and str(subject).strip()
    sums = {name: [value for value in values if not math.isnan(value)] for name, values in parts.items()}
    return Outcome(
        prompt_id=prompt_id,
        subject=str(subject).strip() if known else None,
        correct=None if any(map(math.isnan, accuracy)) else [value > 0.5 for value in accuracy],
        votes=[None if vote is None else order.index(vote) for vote in votes],
        lengths=lengths,
        truncated=truncated,
        rewards={name: (sum(values), len(values)) for name, values in sums.items()},
    )


def statistics(outcomes: Sequence[Outcome], k: Iterable[int]) -> dict[str, Estimate]:
    """All statistics that have data, by the names that evaluations log them under.

    ``avg_at_<n>`` (if all prompts have ``n`` samples), ``pass_at_<k>`` and, for ``k`` above 1, ``maj_at_<k>`` are over
    the judged prompts. ``completion_length``, ``truncated`` and each ``reward/<name>`` are over all rows.

    Raises:
        ValueError: a judged prompt has fewer than ``k`` samples.
    """
    judged = [(each, each.correct) for each in outcomes if each.correct is not None]
    found: dict[str, Estimate] = {}
    if judged:
        if len({each.samples for each, _ in judged}) == 1:
            rights = [sum(correct) for _, correct in judged]
            found[f"avg_at_{judged[0][0].samples}"] = estimate(rights, [each.samples for each, _ in judged])
        for number in k:
            for each, _ in judged:
                if each.samples < number:
                    raise ValueError(
                        f"k = {number} needs {number} samples of each prompt, and prompt {each.prompt_id} has "
                        f"{each.samples}. Choose a smaller k."
                    )
            found[f"pass_at_{number}"] = estimate(
                [pass_at_k(each.samples, sum(correct), number) for each, correct in judged]
            )
            if number > 1:
                found[f"maj_at_{number}"] = estimate(
                    [majority_is_right(each.votes[:number], correct[:number]) for each, correct in judged]
                )
    rows: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for each in outcomes:
        if each.lengths is not None:
            rows["completion_length"].append((sum(each.lengths), each.samples))
        if each.truncated is not None:
            rows["truncated"].append((sum(each.truncated), each.samples))
        for name, part in each.rewards.items():
            rows[f"reward/{name}"].append(part)
    for name, pairs in rows.items():
        if any(count for _, count in pairs):
            found[name] = estimate([total for total, _ in pairs], [count for _, count in pairs])
    return found


def results(outcomes: Sequence[Outcome], k: Iterable[int], settings: Mapping[str, Any]) -> Results:
    """The complete results of an evaluation, as plain data.

    Args:
        outcomes: outcomes of all prompts.
        k: pass@k and maj@k are computed for each of these.
        settings: what was evaluated and how, as plain data that is copied to the results.

    Raises:
        ValueError: there is no prompt, or a prompt has fewer than ``k`` samples.
    """
    if not outcomes:
        raise ValueError("There are no completions to report on.")
    k = list(k)
    outcomes = sorted(outcomes, key=lambda each: (isinstance(each.prompt_id, str), each.prompt_id))
    by_subject: defaultdict[str, list[Outcome]] = defaultdict(list)
    for each in outcomes:
        by_subject[each.subject or NO_SUBJECT].append(each)
    return {
        "settings": dict(settings),
        **_described(outcomes, k),
        "subjects": {name: _described(some, k) for name, some in sorted(by_subject.items())}
        if by_subject.keys() != {NO_SUBJECT}
        else {},
        "interval": {"method": "percentile bootstrap over prompts", "confidence": CONFIDENCE, "resamples": RESAMPLES},
        "outcomes": [dataclasses.asdict(each) for each in outcomes],
    }


def markdown(found: Results) -> str:
    """Results as a readable page: settings, statistics, and the breakdown by subject."""
    settings: dict[str, Any] = found["settings"]
    few, many = found["samples_per_prompt"]
    judged, prompts = found["judged_prompts"], found["prompts"]
    told = {
        name: value for name, value in settings.items() if value not in (None, {}, []) and name not in ("stage", "k")
    }
    facts = [(name.replace("_", " "), _plain(value)) for name, value in told.items()]
    facts += [
        ("prompts", f"{prompts:,}" if judged == prompts else f"{prompts:,}, of which {judged:,} could be judged"),
        ("samples per prompt", f"{few}" if few == many else f"{few} to {many}"),
    ]
    lines = [f"# Results of {settings.get('stage', 'an evaluation')}", "", *markdown_table(["", ""], facts), ""]
    shown = [name for name in found["metrics"] if name not in ("reward/accuracy", "avg_at_1")]
    percent = f"{100 * found['interval']['confidence']:g}% interval"
    rows = [(metric_label(name), *_value_and_interval(name, found["metrics"][name])) for name in shown]
    lines += [*markdown_table(["metric", "value", percent], rows), ""]
    if found["subjects"]:
        averaged = any(name.startswith("avg_at_") for name in shown)  # pass@1 is the same
        hidden = ("pass_at_1",) if averaged else ()
        columns = [name for name in shown if not name.startswith("reward/") and name not in hidden]
        rows = [
            (name, f"{some['prompts']:,}", *(_cell(column, some["metrics"].get(column)) for column in columns))
            for name, some in found["subjects"].items()
        ]
        lines += ["## By subject", "", *markdown_table(["subject", "prompts", *map(metric_label, columns)], rows), ""]
    lines.append(_NOTE.format(resamples=found["interval"]["resamples"]))
    return "\n".join(lines) + "\n"


def write(found: Results, directory: Path, stem: str) -> tuple[Path, Path]:
    """Write ``<stem>.json`` and ``<stem>.md``, or ``<stem>-1`` and so on if either exists. Nothing is overwritten.

    Returns:
        The two paths.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = unused_path(directory / f"{stem}.json", ".md")
    files = file, file.with_suffix(".md")
    outcomes = ",\n".join(json.dumps(each) for each in found["outcomes"])  # one line each, because they are many
    head = json.dumps({name: value for name, value in found.items() if name != "outcomes"}, indent=1, default=str)
    files[0].write_text(f'{head[:-2]},\n "outcomes": [\n{outcomes}\n ]\n}}\n', encoding="utf-8")
    files[1].write_text(markdown(found), encoding="utf-8")
    return files


def _described(outcomes: Sequence[Outcome], k: Sequence[int]) -> dict[str, Any]:
    samples = [each.samples for each in outcomes]
    return {
        "prompts": len(outcomes),
        "judged_prompts": sum(each.correct is not None for each in outcomes),
        "completions": sum(samples),
        "samples_per_prompt": [min(samples), max(samples)],
        "metrics": {name: dataclasses.asdict(value) for name, value in statistics(outcomes, k).items()},
    }


def _value_and_interval(name: str, value: Mapping[str, float | None]) -> tuple[str, str]:
    shown: Callable[[float], str] = "{:.1f}".format if name == "completion_length" else "{:.3f}".format
    low, high = value["low"], value["high"]
    interval = "-" if low is None or high is None else f"{shown(low)} to {shown(high)}"
    return shown(value["value"] or 0.0), interval


def _cell(name: str, value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return "-"
    shown, interval = _value_and_interval(name, value)
    return shown if interval == "-" else f"{shown} ({interval})"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        told = {name.replace("_", " "): item for name, item in value.items() if item is not None}
        return ", ".join(name if item is True else f"{name} {_plain(item)}" for name, item in told.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)
