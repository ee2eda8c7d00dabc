import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_lambdapo.commands.compare.plan import ESTIMATOR, Arm, Run
from lightning_lambdapo.commands.compare.report import Report

Value = Callable[[int], float]


def make(directory: Path, label: str, values: dict[int, Value], *, tokens: int = 10) -> list[Run]:
    """Runs of an arm, 20 steps each: of each seed what ``train/accuracy`` is at a step; 1 less in validation."""
    estimator, *others = label.split()
    arm = Arm(label, {ESTIMATOR: estimator} | dict(other.split("=") for other in others))
    runs = []
    for seed, value in values.items():
        run = Run(arm, seed, directory / label / str(seed))
        file = run.directory / "lightning_logs" / "version_0" / "metrics.csv"
        file.parent.mkdir(parents=True)
        names = "train/accuracy,train/rollout_tokens,train/entropy,train/completion_length,val/pass_at_1"
        steps = [f"0,{step},{value(step)},{tokens},{step / 10},{7}," for step in range(20)]
        lines = [f"epoch,step,{names}", *steps, f"0,19,,,,,{value(19) - 1}"]
        file.write_text("\n".join(lines) + "\n")
        runs.append(run)
    return runs


def level(value: float) -> Value:
    return lambda step: value + step / 100


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return [
        *make(tmp_path, "lambda", {1: level(0.51), 2: level(0.62), 3: level(0.73)}),
        *make(tmp_path, "grpo", {3: level(0.70), 1: level(0.50), 2: level(0.60)}, tokens=20),
        *make(tmp_path, "rloo", {1: level(0.52), 2: level(0.58), 3: level(0.71)}),
        *make(tmp_path, "dr_grpo", {1: level(0.4), 2: level(0.5), 3: level(0.6)}),
    ]


def rows(report: Report) -> dict[str, list[str]]:
    table = [line.strip("| ").split(" | ") for line in report.markdown().splitlines() if line.startswith("| ")]
    return {row[0]: row for row in table[2:]}


def test_table(runs: list[Run]) -> None:
    report = Report(runs, metric="train/accuracy")
    table = rows(report)
    assert list(table) == ["lambda", "rloo", "grpo", "dr_grpo"], "best first"
    # The last tenth of 20 steps is two: level + 0.185.
    mean = (0.51 + 0.62 + 0.73) / 3 + 0.185
    half = 4.302652729911275 * 0.11 / math.sqrt(3)
    gain = (0.01 + 0.02 + 0.03) / 3
    gain_half = 4.302652729911275 * 0.01 / math.sqrt(3)
    assert table["lambda"] == [
        "lambda",
        "3",
        f"{mean:.4f}",
        f"{mean - half:.4f} to {mean + half:.4f}",
        f"{gain:+.4f}",
        f"{gain - gain_half:+.4f} to {gain + gain_half:+.4f}",
        "0.250",
        "0.750",
        "no difference shown",
        "200",
        "7",
        "1.85",
    ]
    assert table["grpo"][4:10] == ["", "", "", "", "baseline", "400"]
    assert table["dr_grpo"][8] == "worse", "0.1 less in every seed"
    assert "better" not in report.markdown()
    assert "**Budgets differ**: from 200 to 400 tokens per run." in report.markdown()
    assert "Budgets" not in Report([run for run in runs if run.arm.label != "grpo"]).markdown()


def test_better_is_said_where_the_interval_says_so(runs: list[Run]) -> None:
    report = Report(runs, metric="train/accuracy", baseline="dr_grpo")
    assert {label: row[8] for label, row in rows(report).items()} == {
        "lambda": "better",
        "rloo": "better",
        "grpo": "better",
        "dr_grpo": "baseline",
    }
    turned = Report(runs, metric="train/accuracy", baseline="dr_grpo", minimize=True)
    assert list(rows(turned)) == ["dr_grpo", "grpo", "rloo", "lambda"]
    assert rows(turned)["grpo"][8] == "worse"


def test_evaluation_is_preferred_and_taken_from_the_end(runs: list[Run]) -> None:
    report = Report(runs)
    assert report.metric == "val/pass_at_1"
    assert rows(report)["grpo"][2] == f"{0.6 + 0.19 - 1:.4f}"


def test_each_arm_is_held_against_the_grpo_arm_of_its_own_settings(tmp_path: Path) -> None:
    levels = {"lambda x=1": 0.5, "lambda x=2": 0.8, "grpo x=1": 0.4, "grpo x=2": 0.9, "rloo x=2": 0.9, "rloo x=3": 0.1}
    runs = [
        run for label, value in levels.items() for run in make(tmp_path, label, dict.fromkeys((1, 2, 3), level(value)))
    ]
    report = Report(runs)
    gains = {label: row[4] for label, row in rows(report).items()}
    assert gains == {
        "lambda x=1": "+0.1000",
        "lambda x=2": "-0.1000",
        "rloo x=2": "+0.0000",
        "rloo x=3": "",  # there is no such arm
        "grpo x=1": "",
        "grpo x=2": "",
    }
    assert rows(report)["rloo x=3"][8] == "no baseline"
    assert "| minus its baseline |" in report.markdown()
    assert "The baseline of an arm is the GRPO arm whose other settings are the same." in report.markdown()
    report.write(tmp_path, command="")
    one = Report(runs, baseline="grpo x=1")
    assert rows(one)["lambda x=2"][4] == "+0.4000"
    assert "| minus grpo x=1 |" in one.markdown()
    assert "other settings are the same" not in one.markdown()
    none = Report([run for run in runs if not run.arm.label.startswith("grpo")])
    assert "| minus lambda x=1 |" in none.markdown()


def test_what_only_some_runs_or_steps_logged(tmp_path: Path) -> None:
    runs = [*make(tmp_path, "grpo", {1: level(0.5)}, tokens=10), *make(tmp_path, "lambda", {1: level(0.5)}, tokens=10)]
    file = runs[1].directory / "lightning_logs" / "version_0" / "metrics.csv"
    lines = [line.rstrip(",") for line in file.read_text().splitlines()[:21]]  # without the validation's line
    lines[0] = lines[0].replace("val/pass_at_1", "train/group_auc")
    lines = [f"{line},{number / 100}" if number % 7 == 3 else line for number, line in enumerate(lines)]
    file.write_text("\n".join(lines) + "\n")
    report = Report(runs)
    assert report.metric == "train/accuracy", "not all runs were validated"
    with pytest.raises(ValueError, match=r"'val/pass_at_1' was not logged.*Choose one with --metric"):
        Report(runs, metric="val/pass_at_1")
    Report(runs[1:], metric="train/group_auc").write(tmp_path, command="")
    with (tmp_path / "curves.csv").open() as table:
        found = {row["step"]: row["rollout_tokens"] for row in csv.DictReader(table) if row["train/group_auc"]}
    assert found == {"2": "30", "9": "100", "16": "170"}


def test_files(runs: list[Run], tmp_path: Path) -> None:
    Report(runs).write(tmp_path, command="lambdapo compare --x", missing=2)
    text = (tmp_path / "report.md").read_text()
    assert "    lambdapo compare --x\n" in text
    assert "**2 runs are not in it**" in text
    with (tmp_path / "runs.csv").open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == 12
    assert records[3] | {"val/pass_at_1": ""} == {
        "arm": "grpo",
        ESTIMATOR: "grpo",
        "seed": "3",
        "val/pass_at_1": "",
        "rollout_tokens": "400",
        "train/entropy": "1.85",
        "train/completion_length": "7.0",
    }
    assert float(records[3]["val/pass_at_1"]) == pytest.approx(0.7 + 0.19 - 1)
    with (tmp_path / "curves.csv").open() as file:
        curve = [row for row in csv.DictReader(file) if (row["arm"], row["seed"]) == ("grpo", "3")]
    assert [int(float(row["rollout_tokens"])) for row in curve] == [20 * step for step in range(1, 21)]
    assert float(curve[4]["train/accuracy"]) == pytest.approx(0.74)
    assert [bool(row["val/pass_at_1"]) for row in curve] == [False] * 19 + [True]
    for name in ("curves", "finals"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_many_arms_leave_some_curves_out(tmp_path: Path) -> None:
    runs = make(tmp_path, "grpo", {1: level(0.01)})
    for number in range(12):
        runs += make(tmp_path, f"lambda x={number}", {1: level(number / 20)})
    report = Report(runs)
    best = [f"lambda x={number}" for number in range(11, 5, -1)]
    assert [arm.label for arm in report._shown()] == [*best, "grpo", "lambda x=0"]
    report.write(tmp_path, command="")
    assert "5 arms" in (tmp_path / "curves.svg").read_text()


def test_mistakes(runs: list[Run]) -> None:
    with pytest.raises(ValueError, match=r"no arm 'ppo' to compare with\. There are lambda, grpo"):
        Report(runs, baseline="ppo")
    with pytest.raises(ValueError, match=r"'val/maj_at_4' was not logged\. There are"):
        Report(runs, metric="val/maj_at_4")
    with pytest.raises(ValueError, match="No run has finished"):
        Report([])


def test_one_comparison_needs_no_correction(runs: list[Run]) -> None:
    report = Report([run for run in runs if run.arm.label in ("lambda", "grpo")], metric="train/accuracy")
    assert "Holm" not in report.markdown()
    assert rows(report)["lambda"][6:8] == ["0.250", "no difference shown"]
    # Three comparisons, of p 0.25 each (three seeds of one sign): 3 x 0.25, and none is below its predecessor.
    three = Report(runs, metric="train/accuracy", baseline="dr_grpo")
    assert [row[6:8] for label, row in rows(three).items() if label != "dr_grpo"] == [["0.250", "0.750"]] * 3
    assert "p (Holm) is corrected for 3 comparisons" in three.markdown()
