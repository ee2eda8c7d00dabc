"""``lambdapo inspect-rollout``: what it computes, what it prints, and what it says of files that are not right."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lambdapo.commands.main import main

# Two completions of equal score: w = 1/2 both ways, so the advantages are 1/2 (1 - 0) and 1/2 (0 - 1).
PAIR = [(1.0, -0.5, 0.5), (0.0, -0.5, -0.5)]
EQUAL = [(1.0, -0.5, 0.0), (1.0, -0.7, 0.0)]
# RewardOutcome ln 3 apart at temperature 1: w_01 = 3/4, w_10 = 1/4; rewards 2 apart.
UNEVEN = [(2.0, 0.0, 1.5), (0.0, -math.log(3), -0.5)]


def records(step: int, prompt: int, rows: Any, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt_id": prompt,
            "sample": sample,
            "prompt": f"question {prompt}\nsecond line",
            "completion": f"completion {sample} of {prompt}",
            "truncated": False,
            "answer": "42",
            "rewards": {"accuracy": total, "format": None},
            "total": total,
            "score": score,
            "advantage": advantage,
            "valid": True,
        }
        | more
        for sample, (total, score, advantage) in enumerate(rows)
    ]


def write(directory: Path, lines: list[dict[str, Any]], **algorithm: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"temperature": 1.0, **algorithm}
    model = {"class_path": "lightning_lambdapo.LambdaPOModule", "init_args": {"algorithm": settings}}
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    return directory


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    main(["inspect-rollout", *map(str, arguments), "--width=100"])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["inspect-rollout", *map(str, arguments)])
    assert stop.value.code == 1
    found = capsys.readouterr()
    assert not found.out
    assert found.err.startswith("lambdapo inspect-rollout: ")
    return found.err


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]


def test_the_first_informative_group_of_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, records(1, 7, PAIR) + records(2, 8, EQUAL) + records(2, 9, UNEVEN))
    text = shown(capsys, run)
    assert "step 2, group 2 of 2" in text
    assert "prompt 9  question 9↵ second line" in text
    assert "answer  42" in text
    assert "weighting confidence, temperature 1.0" in text
    assert "Warning" not in text
    row = next(line for line in text.splitlines() if "completion 0 of 9" in line)
    assert numbers(row) == [2.0, 2.0, 0.0, 1.5]  # accuracy, total, score, advantage
    assert " - " in row  # the format reward is not applicable
    first, second = text.splitlines()[text.splitlines().index(next(x for x in text.splitlines() if "i\\j" in x)) + 1 :][
        :2
    ]
    assert numbers(first) == [0.75, 1.5, 1.5]  # w_01; 0.75 * 2; divided by one peer
    assert numbers(second) == [0.25, -0.5, -0.5]
    assert "row 0: (0.75 (+2.00)) / 1 = +1.5000 / 1 = +1.5000" in text


def test_which_group_and_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, records(1, 7, PAIR) + records(2, 8, EQUAL) + records(2, 9, UNEVEN))
    assert "prompt 7 " in shown(capsys, run, "--step=1")
    equal = shown(capsys, run, "--group=1")
    assert "prompt 8 " in equal
    assert "All rewards of this group are equal" in equal
    assert "prompt 8 " in shown(capsys, run, "--prompt-id=8")
    assert "has no step 5. It has steps 1 to 2." in refused(capsys, run, "--step=5")
    assert "Step 2 has groups 1 to 2, and no group 3." in refused(capsys, run, "--group=3")
    assert "Step 2 has no prompt 7. It has 8, 9." in refused(capsys, run, "--prompt-id=7")


def test_one_prompt_may_have_two_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, records(1, 7, EQUAL) + records(1, 7, PAIR))
    assert "group 2 of 2" in shown(capsys, run)


@pytest.mark.parametrize(
    ("settings", "advantages", "formula"),
    [
        ({"reduction": "sum"}, [1.5, -0.5], "row 0: 0.75 (+2.00) = +1.5000"),
        ({"reduction": "weighted_mean"}, [2.0, -2.0], "row 0: (0.75 (+2.00)) / 0.7500 = +1.5000 / 0.7500 = +2.0000"),
        ({"center": True}, [1.0, -1.0], "minus the group's mean"),
        # rewards 2, 0 (and 2, 0): unbiased standard deviations sqrt(2) of the group, sqrt(4/3) of the step
        ({"scale": "group"}, [1.5 / (2**0.5 + 1e-4), -0.5 / (2**0.5 + 1e-4)], "std of the group's rewards"),
        (
            {"scale": "batch"},
            [1.5 / ((4 / 3) ** 0.5 + 1e-4), -0.5 / ((4 / 3) ** 0.5 + 1e-4)],
            "std of the step's rewards",
        ),
        ({"weighting": "uniform"}, [2.0, -2.0], "weighting uniform"),
        ({"weighting": "agreement"}, [1.5, -1.5], "weighting agreement"),
        ({"temperature": "group_std"}, [2 / (1 + math.exp(-2)), -2 / (1 + math.exp(2))], "temperature 0.5493 (std"),
        ({"estimator": "grpo"}, [1 / (2**0.5 + 1e-4), -1 / (2**0.5 + 1e-4)], "grpo has no pair weights"),
        ({"estimator": "rloo"}, [2.0, -2.0], "rloo has no pair weights"),
    ],
    ids=str,
)
def test_settings_of_the_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    advantages: list[float],
    formula: str,
) -> None:
    rows = [(total, score, advantage) for (total, score, _), advantage in zip(UNEVEN, advantages, strict=True)]
    lines = records(1, 9, rows) + records(1, 10, rows)
    text = shown(capsys, write(tmp_path / "right", lines, **settings))
    assert "Warning" not in text
    assert formula in text
    lines[1]["advantage"] += 2e-4
    assert "Warning: the logged advantages differ by up to 0.0002" in shown(
        capsys, write(tmp_path / "off", lines, **settings)
    )


def test_invalid_and_truncated_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*UNEVEN, (0.0, math.nan, 0.0)]
    lines = records(1, 9, rows)
    lines[2]["valid"] = False
    lines[1]["truncated"] = True
    text = shown(capsys, write(tmp_path, lines))
    assert "Warning" not in text
    assert "completion 1 of 9 [truncated]" in text
    assert "completion 2 of 9 [invalid]" in text
    assert "(0.75 (+2.00)) / 1 " in text  # an invalid row is nobody's peer


def test_without_settings_the_defaults_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, records(1, 7, PAIR))
    (run / "config.yaml").unlink()
    text = shown(capsys, run)
    assert "has no config.yaml: the algorithm's default settings were taken" in text
    assert "temperature 0 (std" in text


def test_wide_groups_are_cut_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(float(index == 0), 0.0, 0.5 if index == 0 else -0.5 / 39) for index in range(40)]
    run = write(tmp_path, records(1, 7, rows))
    text = shown(capsys, run)
    assert all(len(line) <= 100 for line in text.splitlines()[1:])
    assert "Columns 12 to 39 do not fit. --width 236 shows them." in text
    assert "row 0: (39 x 0.50 (+1.00)) / 39 = +19.5000 / 39 = +0.5000" in text
    main(["inspect-rollout", str(run), "--width=236"])
    assert "do not fit" not in capsys.readouterr().out


def test_the_newest_run_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for version in (2, 10):
        write(tmp_path / "lightning_logs" / f"version_{version}", records(version, 7, PAIR))
    (tmp_path / "lightning_logs" / "version_11").mkdir()  # of another command, without completions
    for directory in (tmp_path, tmp_path / "lightning_logs"):
        assert "version_10, step 10" in shown(capsys, directory)
    assert "version_2, step 2" in shown(capsys, tmp_path / "lightning_logs" / "version_2")
    assert "There is no directory" in refused(capsys, tmp_path / "nothing")
    assert "version_11 has no completions.jsonl. Give" in refused(capsys, tmp_path / "lightning_logs" / "version_11")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{broken\n", "line 3 is not valid JSON"),
        ("[1]\n", "line 3 holds list, not an object with named columns"),
        ('{"step": 1, "sample": 2}\n', "line 3, lacks `prompt_id`, `prompt`, `completion`, `total`, `score`"),
    ],
)
def test_corrupt_lines_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, message: str) -> None:
    run = write(tmp_path, records(1, 7, PAIR))
    with (run / "completions.jsonl").open("a") as file:
        file.write(bad)
    assert message in refused(capsys, run)


def test_unfinished_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, records(1, 7, PAIR))
    with (run / "completions.jsonl").open("a") as file:
        file.write('{"step": 2, "prom')  # a run that is still writing
    assert "step 1, group 1 of 1" in shown(capsys, run)
    write(run, records(1, 7, PAIR) + records(2, 7, PAIR) + records(2, 8, PAIR[:1]))
    assert "Step 2 has groups of 1 and 2 completions, so it was not written whole" in refused(capsys, run)
    write(run, [])
    assert "has no completions yet" in refused(capsys, run)
    (run / "config.yaml").write_text("a: [")
    assert "config.yaml is not YAML" in refused(capsys, run)
    (run / "config.yaml").write_text("- 1")
    assert "config.yaml holds list, not the settings of a run" in refused(capsys, run)
    write(run, records(1, 7, PAIR), weighting="sideways")
    assert "`algorithm.weighting` must be one of" in refused(capsys, run)
