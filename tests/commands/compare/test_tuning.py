"""Values that each arm chooses for itself: on which runs, by what, and what the report says of it."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lambdapo.commands.compare.plan import (
    ESTIMATOR,
    decided,
    parse_tuning,
    parse_variation,
    plan_arms,
    plan_runs,
)
from lightning_lambdapo.commands.compare.report import PREFERRED, Report
from lightning_lambdapo.commands.compare.runs import prepare
from lightning_lambdapo.commands.compare.tuning import Choice, Tuning, plan_tuning
from lightning_lambdapo.commands.main import main

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
RATE = "model.optimizer.init_args.lr"
#: Mean accuracy of each arm at each rate, and what a seed adds to it.
LEVELS = {
    ("lambda", 1e-5): 0.3,
    ("lambda", 1e-4): 0.5,
    ("lambda", 1e-3): 0.4,
    ("grpo", 1e-5): 0.3,
    ("grpo", 1e-4): 0.2,
    ("grpo", 1e-3): 0.6,
}
SEEDS = {1001: -0.15, 1002: 0.15}


def log(directory: Path, value: float) -> None:
    file = directory / "lightning_logs" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    names = "train/accuracy,train/rollout_tokens,train/entropy,train/completion_length"
    file.write_text("\n".join([f"epoch,step,{names}", *(f"0,{step},{value},100,1,7" for step in range(10))]) + "\n")


def planned(root: Path) -> Tuning:
    return plan_tuning(plan_arms(["lambda", "grpo"], []), [parse_tuning(f"{RATE}=1e-5,1e-4,1e-3")], 2, root)


def tuned(root: Path, levels: dict[tuple[str, float], float]) -> Tuning:
    tuning = planned(root)
    for run in tuning.runs:
        log(run.directory, levels[run.arm.settings[ESTIMATOR], run.arm.tuned[RATE]] + SEEDS[run.seed])
    return tuning


def choose(tuning: Tuning, **settings: Any) -> Choice:
    return Choice(tuning, **({"metric": None, "preferred": PREFERRED, "minimize": False} | settings))


def test_every_arm_runs_with_every_value_on_seeds_of_the_tuning(tmp_path: Path) -> None:
    tuning = planned(tmp_path)
    assert len({run.directory for run in tuning.runs}) == len(tuning.runs) == 2 * 3 * 2
    assert {run.seed for run in tuning.runs} == {1001, 1002}
    assert tuning.runs[0].directory == tmp_path / "tuning" / "lambda" / "lr=1e-05" / "seed_1001"
    finals = plan_runs(list(tuning.candidates), list(range(1, 1001)), tmp_path)
    assert not {run.seed for run in finals} & {run.seed for run in tuning.runs}


def test_each_arm_has_the_value_of_its_best_mean(tmp_path: Path) -> None:
    choice = choose(tuned(tmp_path, LEVELS))
    assert choice.metric == "train/accuracy"
    assert [(arm.label, arm.settings, arm.tuned) for arm in choice.arms] == [
        ("lambda", {ESTIMATOR: "lambda"}, {RATE: 1e-4}),
        ("grpo", {ESTIMATOR: "grpo"}, {RATE: 1e-3}),
    ]
    worst = choose(tuned(tmp_path / "again", LEVELS), minimize=True)
    assert [arm.tuned[RATE] for arm in worst.arms] == [1e-5, 1e-4]


def test_a_value_that_diverges_is_not_chosen(tmp_path: Path) -> None:
    choice = choose(tuned(tmp_path, LEVELS | {("grpo", 1e-3): math.nan}))
    assert [arm.tuned[RATE] for arm in choice.arms] == [1e-4, 1e-5]
    with pytest.raises(ValueError, match=r"No tuning run of grpo has a value of train/accuracy"):
        choose(tuned(tmp_path / "b", LEVELS | {("grpo", rate): math.nan for rate in (1e-5, 1e-4, 1e-3)}))


def test_the_report_says_what_was_chosen_and_from_what(tmp_path: Path) -> None:
    choice = choose(tuned(tmp_path, LEVELS))
    runs = plan_runs(choice.arms, [1, 2, 3], tmp_path)
    for run in runs:
        log(run.directory, 0.7 + run.seed / 100 + 0.1 * (run.arm.label == "grpo"))
    report = Report(runs, choice=choice)
    text = report.markdown()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    first = {line[0]: line for line in lines[:4]}
    assert first["arm"][-1] == "tuned"
    assert (first["lambda"][-1], first["grpo"][-1]) == ("lr=0.0001", "lr=0.001")
    assert first["lambda"][4] == "-0.1000", "compared with the GRPO arm, whose rate is another"
    assert first["lambda"][2] == f"{0.7 + 0.02:.4f}", "the tuning's own figures are not in it"
    table = text.partition("## Tuning")[2]
    assert "| lambda | lr=0.0001 | 0.5000 | chosen |" in table
    assert "| grpo | lr=1e-05 | 0.3000 |  |" in table
    assert table.count("chosen |") == 2
    assert "best mean over seeds 1001 to 1002" in table
    assert "sampled 12,000 tokens in all" in table
    assert "**At the edge of the values tried**: grpo." in table
    report.write(tmp_path, command="")
    with (tmp_path / "tuning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert rows[0] == {
        "arm": "lambda, lr=1e-05",
        ESTIMATOR: "lambda",
        RATE: "1e-05",
        "seed": "1001",
        "train/accuracy": rows[0]["train/accuracy"],
    }
    assert float(rows[0]["train/accuracy"]) == pytest.approx(0.15)
    with (tmp_path / "runs.csv").open() as file:
        assert {(row["arm"], row[RATE]) for row in csv.DictReader(file)} == {("lambda", "0.0001"), ("grpo", "0.001")}


def compare(output: Path, *arguments: str) -> None:
    small = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--data.batch_size=2"]
    small += ["--model.rollout.group_size=2", "--metric=train/reward"]
    main(["compare", f"--config={CONFIG}", f"--output={output}", *small, *arguments])


def test_tuning_as_a_user_runs_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With an estimator of the user's own among the arms."""
    arguments = ["--estimators=grpo,own_functions.grpo", f"--tune={RATE}=1e-3,1e-2", "--tune-seeds=1", "--seeds=1"]
    compare(tmp_path, *arguments)
    said = capfd.readouterr().out
    assert "6 runs: 4 to tune, then 2 arms (grpo, own_functions.grpo) x 1 seeds. 0 have finished before" in said
    assert "run 4 of 6: own_functions.grpo, lr=0.01, seed 1001: done" in said
    assert "run 6 of 6: own_functions.grpo, seed 1: done" in said
    assert "Chosen by train/reward: grpo: lr=0.0" in said
    with (tmp_path / "runs.csv").open() as file:
        chosen = {row["arm"]: row[RATE] for row in csv.DictReader(file)}
    with (tmp_path / "curves.csv").open() as file:
        curves = [(row["arm"], row["step"], row["train/reward"]) for row in csv.DictReader(file)]
    assert chosen["grpo"] == chosen["own_functions.grpo"]
    assert [each[1:] for each in curves[:2]] == [each[1:] for each in curves[2:]], "the same under another name"
    config = yaml.safe_load((tmp_path / "runs" / "grpo" / "seed_1" / "config.yaml").read_text())
    assert str(config["model"]["init_args"]["optimizer"]["init_args"]["lr"]) == chosen["grpo"]
    report = (tmp_path / "report.md").read_bytes()
    compare(tmp_path, *arguments)
    assert "6 have finished before" in capfd.readouterr().out
    assert (tmp_path / "report.md").read_bytes() == report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"--tune={RATE}=1"], "at least two values"),
        ([f"--tune={RATE}=1,2", f"--vary={RATE}=1,2"], f"{RATE} is tuned, and varied or given a value besides"),
        ([f"--tune={RATE}=1,2", f"--{RATE.replace('init_args.', '')}=1"], "is tuned, and varied or given a value"),
        ([f"--tune={RATE}=1,2", f"--tune={RATE}=1,2"], "is tuned twice"),
        ([f"--tune={RATE}=1,2", "--seeds=1001"], "--seeds is at most 1000"),
        (["--tune=model.optimizer.init_args.rate=1,2"], "rate"),
        (["--tune=data.seed=1,2"], "`compare` sets data.seed for each run"),
        (["--estimators=grpo,own_functions.grop"], "own_functions has no 'grop'. Did you mean grpo?"),
        (  # an arm that is not tuned
            ["--estimators=lambda,own_functions.grop", "--tune=model.algorithm.temperature=0.1,1"],
            "own_functions has no 'grop'. Did you mean grpo?",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as stop:
        compare(tmp_path, "--estimators=lambda,grpo", *arguments)
    assert message in capsys.readouterr().err + str(stop.value)
    assert not list(tmp_path.rglob("train.log"))


def test_the_edge_is_said_of_three_values_at_either_end(tmp_path: Path) -> None:
    lowest = LEVELS | {("lambda", 1e-5): 0.9}
    assert "**At the edge of the values tried**: lambda, grpo." in "\n".join(choose(tuned(tmp_path, lowest)).markdown())
    two = plan_tuning(plan_arms(["lambda", "grpo"], []), [parse_tuning(f"{RATE}=1e-4,1e-3")], 1, tmp_path / "two")
    for run in two.runs:
        log(run.directory, LEVELS[run.arm.settings[ESTIMATOR], run.arm.tuned[RATE]])
    assert "edge" not in "\n".join(choose(two).markdown()), "of two values one is always at an edge"


def test_values_that_are_equally_good_are_named(tmp_path: Path) -> None:
    assert "equally good" not in "\n".join(choose(tuned(tmp_path, LEVELS)).markdown())
    level = LEVELS | {("grpo", 1e-5): LEVELS["grpo", 1e-3]}
    assert "**Several values are equally good**: grpo. The" in "\n".join(
        choose(tuned(tmp_path / "b", level)).markdown()
    )
    worse = LEVELS | {("grpo", 1e-5): LEVELS["grpo", 1e-4]}
    assert "equally good" not in "\n".join(choose(tuned(tmp_path / "c", worse)).markdown()), "they are not the best"


def test_the_argument_of_an_own_estimator_is_tuned_beside_others(tmp_path: Path) -> None:
    arms = plan_arms(["lambda", {"class_path": "my.Power"}], [])
    powers = parse_tuning("model.algorithm.estimator.init_args.power=1,2")
    tuning = plan_tuning(arms, [powers], 1, tmp_path)
    assert [each.label for each in tuning.candidates[arms[0]]] == ["base"], "it has no such argument"
    assert [each.label for each in tuning.candidates[arms[1]]] == ["power=1", "power=2"]
    commands = [prepare(run, {"trainer": {}}, []) for run in tuning.runs]
    assert len(commands) == 2
    for run, power in zip(tuning.runs, (1, 2), strict=True):
        config = yaml.safe_load((run.directory / "config.yaml").read_text())
        assert config["model"]["algorithm"]["estimator"] == {"class_path": "my.Power", "init_args": {"power": power}}
    assert arms[1].settings[ESTIMATOR] == {"class_path": "my.Power"}, "one run's value does not reach another"
    key = next(iter(powers[0]))
    assert not any(decided(arm, key) for arm in arms)
    given = plan_arms([], [parse_variation(f"{key}=3,4")])
    assert decided(given[0], key)
    assert decided(arms[0], ESTIMATOR), "an estimator is not tuned where it is compared"
    assert decided(arms[1], "model.algorithm")


def test_the_metric_is_one_that_all_tuning_runs_logged(tmp_path: Path) -> None:
    tuning = tuned(tmp_path, LEVELS)
    file = tuning.runs[0].directory / "lightning_logs" / "version_0" / "metrics.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([f"{lines[0]},val/pass_at_1", *(f"{line},1" for line in lines[1:])]) + "\n")
    assert choose(tuning).metric == "train/accuracy"


def test_tuned_values_have_directories_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Several tuned values would share a directory"):
        plan_tuning(plan_arms(["lambda", "grpo"], []), [parse_tuning("a=x/y,x_y")], 1, tmp_path)
    classes = parse_tuning("o={class_path: a.W, init_args: {b: 1}},{class_path: a.W, init_args: {b: 2}}")
    tuning = plan_tuning(plan_arms(["lambda", "grpo"], []), [classes], 1, tmp_path)
    assert len({run.directory for run in tuning.runs}) == 4, "their short labels are the same"


def test_arms_with_nothing_to_choose(tmp_path: Path) -> None:
    together = parse_tuning(f"model.algorithm.temperature+{RATE}=0.1+1e-4,1+1e-4")
    tuning = plan_tuning(plan_arms(["lambda", "grpo"], []), [together], 1, tmp_path)
    assert [(arm.label, arm.tuned) for arm in tuning.untuned] == [("grpo", {RATE: 1e-4})]
    assert {run.arm.settings[ESTIMATOR] for run in tuning.runs} == {"lambda"}


def test_a_setting_that_no_arm_uses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no arm uses this setting"):
        plan_tuning(plan_arms(["grpo", "rloo"], []), [parse_tuning("model.algorithm.temperature=1,2")], 1, tmp_path)
