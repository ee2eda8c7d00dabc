"""``lambdapo compare`` as a user runs it: it trains, continues, reports, and finds mistakes before it computes."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lambdapo.commands.compare.command import _Progress
from lightning_lambdapo.commands.compare.plan import Arm, Run, plan_arms, plan_runs
from lightning_lambdapo.commands.compare.runs import prepare
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.runs.text import clock

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
SMALL = [
    "--trainer.max_steps=4",
    "--trainer.limit_val_batches=0",
    "--data.batch_size=2",
    "--model.rollout.group_size=4",
]


def compare(output: Path, *arguments: str, config: Path = CONFIG) -> None:
    main(["compare", f"--config={config}", f"--output={output}", *SMALL, *arguments])


def contents(directory: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.glob(pattern))}


def test_runs_are_made_once_and_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--estimators=lambda,grpo", "--seeds=2", "--workers=2", "--metric=train/reward"]
    compare(tmp_path, *arguments)
    said = capfd.readouterr().out
    assert "4 runs: 2 arms (lambda, grpo) x 2 seeds" in said
    assert "run 4 of 4" in said
    assert "| lambda | 2 |" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        *("runs", "runs.csv", "curves.csv", "report.md"),
        *("curves.png", "curves.svg", "finals.png", "finals.svg"),
    }
    with (tmp_path / "runs.csv").open() as file:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4
    # The first rollout of a seed is the same for every estimator; what was learnt since differs.
    with (tmp_path / "curves.csv").open() as file:
        first = {
            (row["arm"], row["seed"]): (row["rollout_tokens"], row["train/reward"])
            for row in csv.DictReader(file)
            if row["step"] == "0"
        }
    assert first["lambda", "1"] == first["grpo", "1"] != first["lambda", "2"]
    for path in tmp_path.glob("runs/*/seed_1/lightning_logs/version_0/config.yaml"):
        algorithm = yaml.safe_load(path.read_text())["model"]["init_args"]["algorithm"]
        assert algorithm["estimator"] == path.parents[3].name
    logs = contents(tmp_path, "runs/*/*/lightning_logs/*/metrics.csv")
    report = (tmp_path / "report.md").read_bytes()
    compare(tmp_path, *arguments)
    assert "4 have finished before" in capfd.readouterr().out
    assert contents(tmp_path, "runs/*/*/lightning_logs/*/metrics.csv") == logs
    assert (tmp_path / "report.md").read_bytes() == report
    # More seeds continue from there.
    compare(tmp_path, "--estimators=lambda,grpo", "--seeds=3", "--metric=train/reward")
    assert "run 6 of 6" in capfd.readouterr().out
    assert contents(tmp_path, "runs/*/seed_[12]/lightning_logs/*/metrics.csv") == logs


@pytest.mark.parametrize(
    ("by", "at", "validates", "first"),
    [
        ("SIGKILL", 3, False, "2"),
        ("SIGTERM", 3, False, "3"),  # the step is ended, and saved
        ("SIGKILL", 5, True, "3"),  # in the validation after the last step
    ],
)
def test_a_killed_run_continues(
    tmp_path: Path, by: str, at: int, validates: bool, first: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["trainer"]["callbacks"][0]["init_args"]["every_n_rollouts"] = 1
    outputs = {}
    for name in ("killed", "whole"):
        flag = tmp_path / f"{name}.flag"
        if name == "whole":
            flag.touch()
        config["model"]["init_args"]["rewards"] = [
            {"class_path": "dying.DiesOnce", "init_args": {"flag": str(flag), "at": at, "by": by}}
        ]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        outputs[name] = tmp_path / name
        arguments = ["--vary=model.algorithm.score=mean,sum", "--seeds=1"]
        if validates:
            arguments += ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=4"]
        if name == "killed":
            with pytest.raises(SystemExit) as stop:
                compare(outputs[name], *arguments, config=tmp_path / "killed.yaml")
            assert stop.value.code == 1
            said = capfd.readouterr().out
            assert "run 1 of 2: score=mean, seed 1: FAILED" in said
            assert f"See {outputs[name] / 'runs' / 'score=mean' / 'seed_1' / 'train.log'}" in said
            assert "**1 runs are not in it**" in (outputs[name] / "report.md").read_text()
        compare(outputs[name], *arguments, config=tmp_path / f"{name}.yaml")
    run = outputs["killed"] / "runs" / "score=mean" / "seed_1" / "lightning_logs"
    assert {path.name for path in run.iterdir()} == {"version_0", "version_1"}
    with (run / "version_1" / "metrics.csv").open() as file:
        assert next(csv.DictReader(file))["step"] == first, "it went on after what was saved"
    assert contents(outputs["killed"], "runs.csv") == contents(outputs["whole"], "runs.csv")
    assert contents(outputs["killed"], "curves.csv") == contents(outputs["whole"], "curves.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to compare"),
        (["--estimators=grpo"], "Nothing to compare"),
        (["--vary=model.algorithm.score=mean"], "at least two values"),
        (["--estimators=lambda,grpo", "--model.algorithm.estimator=rloo"], "is varied, and given a value besides"),
        (["--vary=data.batch_size=2,4"], "data.batch_size is varied, and given a value besides"),
        (["--vary=model.algorithm.score=mean,sum", "--vary=model.algorithm.score=mean,sum"], "varied twice"),
        (["--estimators=lambda,grpo", "--baseline=ppo"], "no arm 'ppo'"),
        (["--estimators=lambda,grpo", "--seeds=0"], "must be at least 1, got 0"),
        (["--estimators=lambda,ppo"], "ppo"),
        (["--vary=model.algorithm.skore=mean,sum"], "skore"),
        (["--estimators=lambda,grpo", "--data.train.path=none.jsonl"], "takes no `path`"),
        (["--vary=model.rewards.7.weight=0,1"], "asks for '7' of a list of 2"),
        (["--estimators=lambda,grpo", "--config=other.yaml"], "All runs share one --config, got 2"),
        (["--estimators=lambda,grpo", "--seed_everything=7"], "`compare` sets seed_everything for each run"),
        (["--estimators=lambda,grpo", "--model.init_args.seed", "7"], "`compare` sets model.seed for each run"),
        (["--estimators=lambda,grpo", "--model={init_args: {seed: 7}}"], "`compare` sets model.seed for each run"),
        (["--estimators=lambda,grpo", "--trainer", "{logger: false}"], "`compare` sets trainer.logger for each run"),
        (["--estimators=lambda,grpo", "--data.seed=7"], "`compare` sets data.seed for each run"),
        (["--vary=data.seed=1,2"], "`compare` sets data.seed for each run"),
        (["--estimators=lambda,grpo", "--trainer.logger.save_dir=x"], "`compare` sets trainer.logger for each run"),
        (["--estimators=lambda,grpo", "--trainer.log_every_n_steps=5"], "`compare` sets trainer.log_every_n_steps"),
        (["--estimators=lambda,grpo", "--ckpt_path=best"], "`compare` sets ckpt_path for each run"),
        (["--vary=model.algorithm.score=[mean,sum"], "is not YAML. Close its brackets"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as stop:
        compare(tmp_path, *arguments)
    assert message in capsys.readouterr().err + str(stop.value)
    assert not list(tmp_path.glob("runs/*/*/train.log"))


def test_an_absent_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare(tmp_path, "--estimators=lambda,grpo", config=Path("/nowhere.yaml"))
    assert "/nowhere.yaml cannot be read" in capsys.readouterr().err


def test_a_directory_of_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = plan_runs(plan_arms(["lambda", "grpo"], []), [1], tmp_path)[0]
    for left in ("lightning_logs/version_0/metrics.csv", "lightning_logs/version_0/checkpoints/last.ckpt"):
        prepare(run, {"trainer": {}}, ["--a=1"])
        (run.directory / left).parent.mkdir(parents=True)
        (run.directory / left).touch()
        prepare(run, {"trainer": {}}, ["--a=1"])
        for base, arguments in (({"trainer": {"max_steps": 1}}, ["--a=1"]), ({"trainer": {}}, ["--a=2"])):
            with pytest.raises(ValueError, match=r"holds a run of other settings .*Choose another --output"):
                prepare(run, base, arguments)
        shutil.rmtree(run.directory)


@pytest.mark.parametrize(
    "mistake",
    [
        "--model.algorithm.clip_low=-1",  # found in the rehearsal
        "--data.train={preset: null, task: null, path: absent.jsonl}",  # found when the data are read, in the runs
    ],
)
def test_a_mended_command_goes_on_in_the_same_directory(
    tmp_path: Path, mistake: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--estimators=lambda,grpo", "--seeds=1", "--metric=train/reward"]
    with pytest.raises((SystemExit, ValueError)):
        compare(tmp_path, *arguments, mistake)
    capfd.readouterr()
    compare(tmp_path, *arguments)
    said = capfd.readouterr().out
    assert "run 2 of 2: grpo, seed 1: done" in said
    assert "Seed set to" not in said, "rehearsals are silent"


def test_a_run_logs_to_csv_beside_the_users_loggers(tmp_path: Path) -> None:
    own = "lightning.pytorch.loggers.CSVLogger"
    board = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "logs"}}
    for number, (logger, others) in enumerate([(None, []), (True, []), (board, [board]), ([board], [board])]):
        run = Run(Arm("a", {}), number, tmp_path / str(number))
        base = {"trainer": {"logger": logger, "log_every_n_steps": 50}, "data": {"class_path": "mine.Data"}}
        command = prepare(run, base, ["--x=1"])
        config = yaml.safe_load((run.directory / "config.yaml").read_text())
        assert [each["class_path"] for each in config["trainer"]["logger"]] == [own, *(o["class_path"] for o in others)]
        assert config["trainer"]["logger"][0]["init_args"]["save_dir"] == str(run.directory)
        assert config["trainer"]["default_root_dir"] == str(run.directory)
        assert config["seed_everything"] == number
        assert config["trainer"]["log_every_n_steps"] == 1, "tokens are counted step by step"
        assert config["data"] == {"class_path": "mine.Data"}, "it may have no seed"
        assert command == ["fit", f"--config={run.directory / 'config.yaml'}", "--x=1", "--ckpt_path=last"]
    base = {"data": {"init_args": {"batch_size": 1}}, "model": {"init_args": {"seed": 3, "lora": None}}}
    prepare(Run(Arm("a", {}), 5, tmp_path / "5"), base, [])
    config = yaml.safe_load((tmp_path / "5" / "config.yaml").read_text())
    assert config["data"]["init_args"] == {"batch_size": 1, "seed": 5}
    assert config["model"]["init_args"] == {"seed": None, "lora": None}, "a fixed seed would make all runs alike"


def test_progress_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    progress = _Progress(Console(soft_wrap=True), total=10, done=3, workers=2)
    progress(Run(Arm("grpo", {}), 4, Path()), True, 50.0)
    progress(Run(Arm("rloo", {}), 4, Path()), False, 70.0)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "run 4 of 10: grpo, seed 4: done in 50 s, about 2 min 30 s left"
    assert second == "run 5 of 10: rloo, seed 4: FAILED in 1 min 10 s, about 2 min 30 s left"
    assert clock(3 * 3600 + 125) == "3 h 02 min"


def test_a_run_may_have_several_ranks(tmp_path: Path) -> None:
    """Two ranks with half of the batch each sample what one with all of it does"""
    arguments = ["--estimators=lambda,grpo", "--seeds=1", "--metric=train/reward"]
    compare(tmp_path / "one", *arguments, "--data.batch_size=4")
    command = [sys.executable, "-m", "lightning_lambdapo", "compare", f"--config={CONFIG}", "--output=two", *SMALL]
    command += [*arguments, "--trainer.devices=2", "--trainer.strategy=ddp"]
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True) as process:
        try:
            assert process.wait(240) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its run ends with it
    found = []
    for name in ("one", "two"):
        with (tmp_path / name / "curves.csv").open() as file:
            found.append([(row["arm"], row["step"], row["rollout_tokens"]) for row in csv.DictReader(file)])
    assert found[0] == found[1]
    assert len(found[0]) == 8
