"""Completions of a group as a table: in a terminal, in Markdown, and as plain rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_lambdapo.runs.text import markdown_table

Record = Mapping[str, Any]


def shorten(text: str, limit: int) -> str:
    r"""Text on one line of at most ``limit`` characters. A longer text keeps its beginning and end.

    Example:
        >>> shorten("first line\nsecond line", 100)
        'first line↵ second line'
        >>> shorten("abcdefghijklmnopqrstuvwxyz", 9)
        'abcd…wxyz'
    """
    flat = "".join(c if c.isprintable() else " " for c in text.strip().replace("\r", "").replace("\n", "↵ "))
    if len(flat) <= limit:
        return flat
    tail = (limit - 1) // 2
    return f"{flat[: limit - 1 - tail]}…{flat[len(flat) - tail :]}"


def telling_group(records: Sequence[Record]) -> list[Record]:
    """A step's completions of the first prompt whose valid rewards differ, or else of the first prompt."""
    prompts: dict[int, list[Record]] = {}
    for record in records:
        prompts.setdefault(record["prompt_id"], []).append(record)
    groups = list(prompts.values())
    telling = (group for group in groups if len({record["total"] for record in group if record["valid"]}) > 1)
    return next(telling, groups[0])


def group_table(records: Sequence[Record], *, width: int) -> Table:
    """A group for the terminal.

    Args:
        records: records of one group.
        width: available columns. Completions are shortened to about three lines.
    """
    names = list(records[0].get("rewards", {}))
    long = any(len(record["completion"]) > width // 3 for record in records)
    table = Table(box=box.SIMPLE_HEAD, show_lines=long, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("completion", ratio=1, overflow="fold")
    for name in names:
        table.add_column(Text(name.replace("_", " ")), justify="right", style="dim", max_width=8)
    for header in ("total", "score", "advantage"):
        table.add_column(header, justify="right")
    limit = max(60, 3 * (width - 30 - 10 * len(names)) - 15)
    for record in records:
        advantage = record["advantage"]
        style = "green" if advantage > 0 else "red" if advantage < 0 else "dim"
        completion = Text(shorten(record["completion"], limit))
        for remark in remarks(record):
            completion.append(f" [{remark}]", "yellow")
        table.add_row(
            str(record["sample"]),
            completion,
            *(_number(record["rewards"][name]) for name in names),
            _number(record["total"]),
            _number(record["score"]),
            Text(f"{advantage:+.3f}" if advantage else "0", style),
        )
    return table


def remarks(record: Record) -> list[str]:
    """Remarks on a completion: truncated, invalid."""
    return [*(["truncated"] if record.get("truncated") else []), *([] if record["valid"] else ["invalid"])]


def plain_rows(records: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """Headers and rows, for loggers with their own tables."""
    names = list(records[0].get("rewards", {}))
    plain = ("total", "score", "advantage", "truncated", "valid")
    rows = [
        [record["prompt_id"], record["sample"], record["prompt"], record["completion"]]
        + [record["rewards"][name] for name in names]
        + [record[name] for name in plain]
        for record in records
    ]
    return ["prompt_id", "sample", "prompt", "completion", *names, *plain], rows


def markdown_group(records: Sequence[Record]) -> str:
    """A group as Markdown: the prompt, then a row per completion."""
    headers, rows = plain_rows(records)
    kept = [index for index, name in enumerate(headers) if name not in ("prompt_id", "prompt")]
    shown = [headers[index] for index in kept]
    cells = ([_markdown(row[index]) for index in kept] for row in rows)
    lines = markdown_table(shown, cells, numbers=False, escape=str)
    prompt = records[0]
    heading = f"**prompt {prompt['prompt_id']}**: {_markdown(prompt['prompt'])}"
    return "\n".join([heading, "", *lines])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _markdown(value: Any) -> str:
    if isinstance(value, str):
        escaped = "".join(f"\\{c}" if c in "\\`*_|<>[]#" else c for c in shorten(value, 2000))
        return escaped or " "
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _number(value) if isinstance(value, float) else "-" if value is None else str(value)
