"""Formatting for people: names, times, counts, Markdown tables."""

from collections.abc import Callable, Iterable, Sequence


def metric_label(name: str) -> str:
    """A statistic's usual name.

    Example:
        >>> metric_label("pass_at_4"), metric_label("truncated"), metric_label("reward/format")
        ('pass@4', 'truncated share', 'reward format')
    """
    names = {"truncated": "truncated share", "completion_length": "completion length (tokens)"}
    return names.get(name, name.replace("_at_", "@").replace("/", " "))


def clock(seconds: float) -> str:
    """A duration, in its two largest units.

    Example:
        >>> clock(3661.4), clock(61.0), clock(4.2)
        ('1 h 01 min', '1 min 01 s', '4 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def thousands(value: float) -> str:
    """A rate in few characters.

    Example:
        >>> thousands(412.3), thousands(12345.0)
        ('412', '12.3k')
    """
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def escape_cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").strip()


def markdown_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: bool = True,
    escape: Callable[[str], str] = escape_cell,
) -> list[str]:
    """Lines of a Markdown table.

    Args:
        headers: headers of the columns.
        rows: cells of the rows.
        numbers: align all columns but the first to the right, if there are headers.
        escape: converts a text to a cell.
    """
    right = "---:" if numbers and headers[0] else "---"
    aligned = ["---", *([right] * (len(headers) - 1))]
    return [f"| {' | '.join(line)} |" for line in (headers, aligned, *([*map(escape, row)] for row in rows))]
