"""The command line of ``lambdapo compare``."""

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_lambdapo.commands.compare import runs as running
from lightning_lambdapo.commands.compare.plan import (
    ESTIMATOR,
    Arm,
    Run,
    decided,
    parse_estimators,
    parse_tuning,
    parse_variation,
    plan_arms,
    plan_runs,
)
from lightning_lambdapo.commands.compare.report import PREFERRED, Report
from lightning_lambdapo.commands.compare.settings import given_besides, same_key
from lightning_lambdapo.commands.compare.tuning import LAST_SEED, Choice, Tuning, plan_tuning
from lightning_lambdapo.commands.main import rehearse
from lightning_lambdapo.functional.ranges import home_path
from lightning_lambdapo.runs.files import load_yaml
from lightning_lambdapo.runs.text import clock

_DESCRIPTION = """\
Train with several estimators or settings, each with several seeds, one run after another, and report which helps:
runs.csv, curves.csv, report.md, curves.png and finals.png (both also as SVG) in the output directory.
With --tune each arm first chooses its own best value of a setting, on seeds of their own (tuning.csv).
You can stop it at any moment. The same command then continues: finished runs are not repeated, and a killed run resumes
from its last checkpoint. All other options are passed to each run, as to `lambdapo fit`."""


def main(args: list[str]) -> None:
    """Run ``lambdapo compare``.

    Args:
        args: the command line, without the program and ``compare``.
    """
    console = Console(highlight=False, soft_wrap=True)
    parser = _parser()
    options, arguments = parser.parse_known_args(args)
    try:
        if len(options.config) > 1:
            raise ValueError(f"All runs share one --config, got {len(options.config)}. Put them into one file.")
        arms = _arms(options, arguments)
        tuning = _tuning(options, arms, arguments)
        seeds = list(range(1, options.seeds + 1))
        runs = plan_runs(arms, seeds, options.output)
        base = load_yaml(options.config[0])
        first = [] if tuning is None else tuning.runs
        commands = [(run, running.prepare(run, base, arguments)) for run in first or runs]
        untuned = [] if tuning is None else plan_runs(tuning.untuned, seeds, options.output)
        later = [(run, running.prepare(run, base, arguments)) for run in untuned]
    except ValueError as error:
        parser.error(str(error))
    done = sum(map(running.finished, [*first, *runs]))
    before = f"{len(first)} to tune, then " if first else ""
    console.print(
        f"{len(first) + len(runs)} runs: {before}{len(arms)} arms ({', '.join(arm.label for arm in arms)}) x "
        f"{options.seeds} seeds. {done} have finished before. Files: {options.output}"
    )
    progress = _Progress(console, total=len(first) + len(runs), done=done, workers=options.workers)
    choice = None
    if tuning is not None:
        _rehearse(_unfinished(later))  # before the other arms are tuned
        if _train(console, commands, progress):
            console.print("Values are chosen when all tuning runs have finished. The same command continues.")
            raise SystemExit(1)
        try:
            choice = Choice(tuning, metric=options.metric, preferred=PREFERRED, minimize=options.minimize)
            runs = plan_runs(choice.arms, seeds, options.output)
            commands = [(run, running.prepare(run, base, arguments)) for run in runs]
        except ValueError as error:
            parser.error(str(error))
        chosen = "; ".join(f"{arm.label}: {choice.chosen[arm].label}" for arm in choice.means)
        console.print(f"Chosen by {choice.metric}: {chosen}", markup=False)
    failed = _train(console, commands, progress)
    finished = [run for run in runs if running.finished(run)]
    if finished:
        try:
            report = Report(
                finished, metric=options.metric, baseline=options.baseline, minimize=options.minimize, choice=choice
            )
        except ValueError as error:
            parser.error(str(error))
        report.write(
            options.output,
            command=shlex.join(["lambdapo", "compare", *args]),
            missing=len(runs) - len(finished),
        )
        console.print(report.markdown(), markup=False)
    if failed:
        raise SystemExit(1)


def _train(console: Console, commands: Sequence[tuple[Run, list[str]]], progress: "_Progress") -> list[Run]:
    """Train the runs that have not finished, and name those that fail."""
    todo = _unfinished(commands)
    _rehearse(todo)
    failed = running.train_all(todo, workers=progress.workers, report=progress)
    for run in failed:
        console.print(f"FAILED: {run.arm.label}, seed {run.seed}. See {run.directory / 'train.log'}", markup=False)
    return failed


def _unfinished(commands: Sequence[tuple[Run, list[str]]]) -> list[tuple[Run, list[str]]]:
    return [(run, command) for run, command in commands if not running.finished(run)]


def _rehearse(commands: Sequence[tuple[Run, list[str]]]) -> None:
    """Find mistakes in the settings of each arm."""
    for command in {run.arm.label: command for run, command in commands}.values():
        rehearse(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lambdapo compare",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=home_path, action="append", required=True, help="configuration that all runs share"
    )
    parser.add_argument(
        "--estimators", default="", help="comma-separated: lambda, grpo, dr_grpo, rloo, or import paths of functions"
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a setting and its values, e.g. model.algorithm.temperature=group_std,0.1. Several make a grid. "
        "KEY1+KEY2=A1+B1,A2+B2 changes settings together",
    )
    parser.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a setting whose best value each arm uses, e.g. model.optimizer.init_args.lr=1e-5,1e-4. Each arm is first "
        "run with every value on seeds that the comparison does not use. Several make a grid",
    )
    parser.add_argument("--tune-seeds", type=_positive, default=2, help="tuning runs per value (default 2)")
    parser.add_argument("--seeds", type=_positive, default=5, help="runs per arm, with seeds 1 to N (default 5)")
    parser.add_argument("--output", type=home_path, default=Path("compare"), help="directory (default compare)")
    parser.add_argument("--workers", type=_positive, default=1, help="runs at once (default 1)")
    parser.add_argument("--metric", help="logged key to compare (default: val/pass_at_1, else training's accuracy)")
    parser.add_argument("--minimize", action="store_true", help="a smaller metric is better")
    parser.add_argument(
        "--baseline",
        help="label of the arm to compare all others with (default: the GRPO arm with the same other settings, or the "
        "first arm if there is no GRPO)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _arms(options: argparse.Namespace, arguments: Sequence[str]) -> list[Arm]:
    """The arms of the options.

    Raises:
        ValueError: nothing is compared, or a setting is both varied and fixed, or two labels give the same directory.
    """
    estimators = parse_estimators(options.estimators)
    variations = [parse_variation(text) for text in options.vary]
    varied = [key for variation in variations for key in variation[0]] + ([ESTIMATOR] if estimators else [])
    for key in varied:
        if given_besides(key, arguments):
            raise ValueError(f"{key} is varied, and given a value besides. Drop one of them.")
    for name, count in Counter(varied).items():
        if count > 1:
            raise ValueError(f"{name} is varied twice. Put its values into one --vary.")
    arms = plan_arms(estimators, variations)
    if len(arms) < 2:
        raise ValueError("Nothing to compare: give --estimators lambda,grpo or --vary KEY=V1,V2.")
    for slug, count in Counter(arm.slug for arm in arms).items():
        if count > 1:
            raise ValueError(
                f"Several arms would share the directory {slug!r}. Choose values with more distinct names."
            )
    if options.baseline is not None and options.baseline not in [arm.label for arm in arms]:
        raise ValueError(f"There is no arm {options.baseline!r}. There are {', '.join(arm.label for arm in arms)}.")
    return arms


def _tuning(options: argparse.Namespace, arms: Sequence[Arm], arguments: Sequence[str]) -> Tuning | None:
    """The tuning runs of the options, or None without ``--tune``.

    Raises:
        ValueError: a tuned setting is also varied, fixed or tuned twice, no arm uses it, or its seeds are the
            comparison's.
    """
    if not options.tune:
        return None
    alternatives = [parse_tuning(text) for text in options.tune]
    keys = [key for alternative in alternatives for key in alternative[0]]
    for index, key in enumerate(keys):
        if given_besides(key, arguments) or any(decided(arm, key) for arm in arms):
            raise ValueError(f"{key} is tuned, and varied or given a value besides. Drop one of them.")
        if any(same_key(key, name) for name in keys[:index]):
            raise ValueError(f"{key} is tuned twice. Put its values into one --tune.")
    if options.seeds > LAST_SEED:
        raise ValueError(f"With --tune, --seeds is at most {LAST_SEED}, because later seeds are those of the tuning.")
    return plan_tuning(arms, alternatives, options.tune_seeds, options.output)


class _Progress:
    """Prints which run has ended, whether it succeeded, and how long the rest will take."""

    def __init__(self, console: Console, *, total: int, done: int, workers: int) -> None:
        self.console = console
        self.total = total
        self.done = done
        self.workers = workers
        self.seconds: list[float] = []

    def __call__(self, run: Run, succeeded: bool, seconds: float) -> None:
        self.done += 1
        self.seconds.append(seconds)
        left = sum(self.seconds) / len(self.seconds) * (self.total - self.done) / self.workers
        self.console.print(
            f"run {self.done} of {self.total}: {run.arm.label}, seed {run.seed}: "
            f"{'done' if succeeded else 'FAILED'} in {clock(seconds)}, about {clock(left)} left",
            markup=False,
        )
