"""``lambdapo inspect-rollout``: one group of a training step, with rewards, pair weights and advantages."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_lambdapo.config import AlgorithmConfig, from_mapping
from lightning_lambdapo.functional import lambda_advantages, pairwise_weights
from lightning_lambdapo.functional.own_functions import function_name
from lightning_lambdapo.functional.ranges import home_path
from lightning_lambdapo.learning.estimating import estimate_advantages
from lightning_lambdapo.runs.files import (
    Record,
    RunFileError,
    find_run,
    read_config,
    read_training_completions,
    section,
)
from lightning_lambdapo.runs.tables import group_table, shorten

_FILE = "completions.jsonl"
_NEEDED = ("prompt_id", "sample", "prompt", "completion", "total", "score", "advantage", "valid")
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Group:
    """One prompt's completions with their pair weights and advantages.

    Attributes:
        records: as logged, in the order of their samples.
        weights: ``(G, G)`` pair weights. None for an estimator without any.
        advantages: ``(G,)``, computed again.
        differences: ``(G, G)``, :math:`R_i - R_j` over valid pairs.
    """

    records: list[Record]
    weights: Tensor | None
    advantages: Tensor
    differences: Tensor

    @property
    def informative(self) -> bool:
        """True if two rewards differ."""
        return bool(self.differences.any())

    @property
    def mismatch(self) -> float:
        """Largest difference between a logged advantage and the one computed again."""
        logged = torch.tensor([record["advantage"] for record in self.records], dtype=torch.float64)
        return float((logged - self.advantages).abs().max())


def main(args: list[str]) -> None:
    """Print one group of a training step.

    Args:
        args: of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="lambdapo inspect-rollout",
        description="Show one group of a training step: rewards, pair weights, advantages.",
    )
    parser.add_argument("run", type=home_path, metavar="RUN_DIR", help="a run's directory, or one that contains runs")
    parser.add_argument("--step", type=int, help="rollout step, from 1 (default: the last)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--prompt-id", type=int, metavar="ID", help="the group of this prompt")
    which.add_argument("--group", type=int, metavar="K", help="the step's k-th group, from 1 (default: the first one "
                       "whose rewards differ)")  # fmt: skip
    parser.add_argument("--width", type=int, help="columns of output (default: the terminal's)")
    options = parser.parse_args(args)
    console = Console(width=options.width, highlight=False)
    try:
        run = find_run(options.run, _FILE)
        config = read_config(run)
        settings = from_mapping(AlgorithmConfig, section(config, "model").get("algorithm") or {})
        step, records = read_step(run / _FILE, options.step)
        groups = build_groups(records, settings)
        number = choose(groups, step, prompt_id=options.prompt_id, number=options.group)
    except (ValueError, TypeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    show(console, groups[number - 1], settings, title=f"{run}, step {step}, group {number} of {len(groups)}")
    if config is None:
        note = "This run has no config.yaml: the algorithm's default settings were taken."
        console.print(Text(note, "yellow"), soft_wrap=True)


def read_step(file: Path, step: int | None) -> tuple[int, list[Record]]:
    """Records of one step of a file of completions.

    Args:
        file: the file.
        step: the step. None uses the last one.

    Returns:
        The step and its records.

    Raises:
        RunFileError: there is no such step, or one of its records is incomplete.
    """
    wanted: list[tuple[str, Record]] = []
    steps: dict[int, None] = {}
    for where, record in read_training_completions(file):
        if step is None and record["step"] not in steps:
            wanted.clear()
        if step is None or record["step"] == step:
            wanted.append((where, record))
        steps[record["step"]] = None
    if not steps:
        raise RunFileError(f"{file} has no completions yet.")
    if not wanted:
        known = f"steps {min(steps)} to {max(steps)}"
        part = "" if len(steps) == max(steps) - min(steps) + 1 else f" ({len(steps)} of them)"
        raise RunFileError(f"{file} has no step {step}. It has {known}{part}.")
    for where, record in wanted:
        missing = [name for name in _NEEDED if name not in record]
        if missing:
            raise RunFileError(f"{where}, lacks {', '.join(f'`{name}`' for name in missing)}.")
    return wanted[0][1]["step"], [record for _, record in wanted]


def build_groups(records: Sequence[Record], settings: AlgorithmConfig) -> list[Group]:
    """Split a step's records into groups, and compute weights and advantages again.

    Raises:
        RunFileError: the groups differ in size, so some are incomplete.
    """
    parts: list[list[Record]] = []
    for record in records:
        if record["sample"] == 0 or not parts:
            parts.append([])
        parts[-1].append(record)
    sizes = sorted({len(part) for part in parts})
    if len(sizes) > 1 or sizes[0] < 2:
        raise RunFileError(
            f"Step {records[0]['step']} has groups of {' and '.join(map(str, sizes))} completions, so it was not "
            "written whole. Choose another step."
        )
    rewards, scores = (
        torch.tensor([[record[name] for record in part] for part in parts], dtype=torch.float64)
        for name in ("total", "score")
    )
    valid = torch.tensor([[record["valid"] for record in part] for part in parts], dtype=torch.bool)
    if settings.estimator != "lambda":
        weights = None
        advantages = estimate_advantages(settings, rewards, scores, valid)
    else:
        pairs: dict[str, Any] = {"weighting": settings.weighting, "temperature": settings.temperature, "valid": valid}
        weights = pairwise_weights(rewards, scores, **pairs)
        advantages = lambda_advantages(
            rewards, scores, reduction=settings.reduction, center=settings.center, scale=settings.scale, **pairs
        )
    both = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    differences = torch.where(both, rewards.unsqueeze(-1) - rewards.unsqueeze(-2), 0.0)
    return [
        Group(part, None if weights is None else weights[index], advantages[index], differences[index])
        for index, part in enumerate(parts)
    ]


def choose(groups: Sequence[Group], step: int, *, prompt_id: int | None, number: int | None) -> int:
    """Number, from 1, of the group to show.

    Raises:
        RunFileError: the step has no such group.
    """
    if number is not None:
        if not 1 <= number <= len(groups):
            raise RunFileError(f"Step {step} has groups 1 to {len(groups)}, and no group {number}.")
        return number
    ids = [group.records[0]["prompt_id"] for group in groups]
    if prompt_id is not None:
        if prompt_id not in ids:
            raise RunFileError(
                f"Step {step} has no prompt {prompt_id}. It has {', '.join(map(str, sorted(set(ids))))}."
            )
        return ids.index(prompt_id) + 1
    return next((index for index, group in enumerate(groups, start=1) if group.informative), 1)


def show(console: Console, group: Group, settings: AlgorithmConfig, *, title: str) -> None:
    """Print a group."""
    first = group.records[0]
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(Text.assemble((f"prompt {first['prompt_id']}  ", "bold"), shorten(first["prompt"], 600)))
    if first.get("answer") is not None:
        console.print(Text.assemble(("answer  ", "bold"), shorten(str(first["answer"]), 200)))
    console.print(group_table(group.records, width=console.width))
    if not group.informative:
        console.print("All rewards of this group are equal, so all advantages are 0.")
    if group.weights is None:
        console.print(f"The estimator {function_name(settings.estimator)} has no pair weights.")
    else:
        _show_weights(console, group, group.weights, settings)
    if group.mismatch > _TOLERANCE:
        console.print(
            Text(
                f"Warning: the logged advantages differ by up to {group.mismatch:.2g} from those computed here. The "
                "file was written with other settings than those of config.yaml, or it was edited.",
                "bold red",
            ),
            soft_wrap=True,
        )


def _show_weights(console: Console, group: Group, weights: Tensor, settings: AlgorithmConfig) -> None:
    """The weights as a heat map, with the sum and advantage of each row."""
    size = len(group.records)
    sums = (weights * group.differences).sum(-1)
    peers = max(1, sum(record["valid"] for record in group.records) - 1)
    console.print()
    console.print(Text.assemble(("pair weights w_ij", "bold"), f"  {_weighting(group, settings)}"))
    room = max(2, (console.width - 36) // 5)
    table = Table(box=None, padding=(0, 0), show_edge=False)
    table.add_column("i\\j ", justify="right", no_wrap=True)
    for column in range(min(size, room)):
        table.add_column(f"{column} ", justify="right", no_wrap=True)
    table.add_column("  sum w (R_i-R_j)", justify="right", no_wrap=True)
    table.add_column("  advantage", justify="right", no_wrap=True)
    for row, record in enumerate(group.records):
        cells = [_cell(group, weights, row, column) for column in range(min(size, room))]
        outcome = f"{sums[row]:+.4f}", f"{group.advantages[row]:+.4f}"
        table.add_row(f"{record['sample']} ", *cells, *outcome)
    console.print(table)
    if room < size:
        console.print(f"Columns {room} to {size - 1} do not fit. --width {36 + 5 * size} shows them.")
    console.print(Text(_formula(settings, peers), "dim"), soft_wrap=True)
    row = int(group.advantages.abs().argmax())
    if group.informative:
        console.print(_example(group, weights, settings, row=row, peers=peers))


def _cell(group: Group, weights: Tensor, row: int, column: int) -> Text:
    """One weight, on a background from pale (0) to strong (1)."""
    usable = group.records[row]["valid"] and group.records[column]["valid"]
    if row == column or not usable:
        return Text("  · ", "dim")
    share = float(weights[row, column])
    pale, strong = (255, 247, 220), (240, 110, 30)
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(pale, strong, strict=True))
    return Text(f"{share:.2f}", f"black on rgb({red},{green},{blue})") + Text(" ")


def _weighting(group: Group, settings: AlgorithmConfig) -> str:
    """The settings of the weights, with the temperature of this group."""
    if settings.weighting == "uniform":
        return "weighting uniform"
    tau = str(settings.temperature)
    if settings.temperature == "group_std":
        confidences = [record["score"] for record in group.records if record["valid"]]
        tau = f"{statistics.pstdev(confidences):.4g} (std of the group's confidences)" if confidences else tau
    return f"weighting {settings.weighting}, temperature {tau}"


def _formula(settings: AlgorithmConfig, peers: int) -> str:
    divisor = {"mean": f" / {peers}", "sum": "", "weighted_mean": " / sum of the row's weights"}[settings.reduction]
    steps = [f"advantage of row i = sum over j of w_ij (R_i - R_j){divisor}"]
    if settings.center:
        steps.append("minus the group's mean")
    if settings.scale != "none":
        steps.append(f"divided by the std of the {'group' if settings.scale == 'group' else 'step'}'s rewards + 0.0001")
    return ", ".join(steps)


def _example(group: Group, weights: Tensor, settings: AlgorithmConfig, *, row: int, peers: int) -> Text:
    """The sum of one row, written out. Equal terms appear once, with their number."""
    terms: dict[str, int] = {}
    for column in range(len(group.records)):
        difference = float(group.differences[row, column])
        if difference:
            term = f"{weights[row, column]:.2f} ({difference:+.2f})"
            terms[term] = terms.get(term, 0) + 1
    written = " + ".join(term if count == 1 else f"{count} x {term}" for term, count in terms.items())
    total = float((weights[row] * group.differences[row]).sum())
    mass = float(weights[row].sum())
    divisor = {"mean": f" / {peers}", "sum": "", "weighted_mean": f" / {mass:.4f}"}[settings.reduction]
    outcome = float(group.advantages[row])
    if settings.center or settings.scale != "none":
        sign = "->"  # further steps follow
    elif settings.reduction == "sum":
        return Text(f"row {row}: {written} = {outcome:+.4f}")
    else:
        sign = "="
    return Text(f"row {row}: ({written}){divisor} = {total:+.4f}{divisor} {sign} {outcome:+.4f}")
