"""Which group of a step is shown, and the tables that show it."""

import io
from typing import Any

import pytest
from rich.console import Console

from lightning_lambdapo.runs.tables import group_table, markdown_group, telling_group

RECORDS: list[dict[str, Any]] = [
    {
        "prompt_id": 7,
        "sample": sample,
        "prompt": "what|is\n2+2?",
        "completion": text,
        "truncated": sample == 1,
        "rewards": {"accuracy": float(sample == 0), "format": None},
        "total": 1.0,
        "score": -0.25,
        "advantage": 0.5 - sample,
        "valid": True,
    }
    for sample, text in enumerate(["four *is* `it`", "[red]no[/red] <b>"])
]


def test_the_group_that_is_shown() -> None:
    same = [record | {"prompt_id": 3} for record in RECORDS]
    differing = [record | {"prompt_id": 9, "total": float(record["sample"])} for record in RECORDS]
    assert telling_group(same + differing + RECORDS) == differing
    assert telling_group(same + RECORDS) == same


def test_a_group_that_differs_by_an_invalid_row_alone_teaches_nothing() -> None:
    same = [record | {"prompt_id": 3} for record in RECORDS] + [
        RECORDS[0] | {"prompt_id": 3, "total": 0.0, "valid": False}
    ]
    differing = [record | {"prompt_id": 9, "total": float(record["sample"])} for record in RECORDS]
    assert telling_group(same + differing) == differing
    assert telling_group(same) == same


@pytest.mark.parametrize("width", [80, 100])
def test_the_printed_table(width: int) -> None:
    screen = io.StringIO()
    Console(file=screen, width=width).print(group_table(RECORDS, width=width))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    header = next(line for line in lines if "completion" in line)
    assert header.split() == ["#", "completion", "accuracy", "format", "total", "score", "advantage"]
    row = next(line for line in lines if "four" in line)
    assert row.split()[-5:] == ["1.000", "-", "1.000", "-0.250", "+0.500"]
    assert "[red]no[/red] <b>" in screen.getvalue()  # not taken for markup
    assert "[truncated]" in screen.getvalue()


def test_the_markdown_table() -> None:
    lines = markdown_group(RECORDS).splitlines()
    assert lines[0] == r"**prompt 7**: what\|is↵ 2+2?"
    assert lines[2] == "| sample | completion | accuracy | format | total | score | advantage | truncated | valid |"
    assert lines[4] == r"| 0 | four \*is\* \`it\` | 1.000 | - | 1.000 | -0.250 | 0.500 | no | yes |"
    assert lines[5].startswith(r"| 1 | \[red\]no\[/red\] \<b\> |")
