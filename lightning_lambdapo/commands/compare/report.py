"""What a comparison writes: a CSV of runs and of curves, a Markdown report, plots as PNG and SVG."""

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lambdapo.commands.compare.plan import ESTIMATOR, Arm, Run, settings_text
from lightning_lambdapo.commands.compare.statistics import (
    Array,
    Difference,
    Interval,
    band,
    final_value,
    holm,
    mean_interval,
    paired_difference,
    read_curves,
    tokens_at,
    total_tokens,
)
from lightning_lambdapo.commands.compare.tuning import Choice
from lightning_lambdapo.runs.text import markdown_table

Curves = dict[str, tuple[Array, Array]]
#: Metrics to compare by default: the first that all runs logged.
PREFERRED = ("val/pass_at_1", "val/reward", "train/accuracy", "train/reward")
_SECONDARY = ("train/entropy", "train/completion_length")
_MOST_CURVES = 8
_UNLIKE = 1.1  # times as many tokens: no longer the same budget


class Report:
    """Final values and curves of the finished runs of a comparison.

    Args:
        runs: the runs that have finished.
        metric: what is compared. None takes the first of ``val/pass_at_1``, ``val/reward``, ``train/accuracy``,
            ``train/reward`` that all runs logged.
        baseline: label of the arm to compare the others with. None compares each with the GRPO arm that has the same
            other settings, or with the first arm if no arm is GRPO.
        minimize: True where a smaller metric is better.
        choice: what tuning runs chose for each arm. Its metric is then the default.

    Raises:
        ValueError: no such metric or baseline, or nothing to report.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        metric: str | None = None,
        baseline: str | None = None,
        minimize: bool = False,
        choice: Choice | None = None,
    ) -> None:
        if not runs:
            raise ValueError("No run has finished, so there is nothing to report.")
        self.curves: dict[Arm, dict[int, Curves]] = {}
        by_label: dict[str, Arm] = {}
        for run in runs:
            arm = by_label.setdefault(run.arm.label, run.arm)
            self.curves.setdefault(arm, {})[run.seed] = read_curves(run.directory)
        self.choice = choice
        chosen_by = None if choice is None else choice.metric
        self.metric = metric or chosen_by or next(filter(self._in_all, PREFERRED), "train/reward")
        self.minimize = minimize
        self.finals = {
            arm: {seed: final_value(curves, self.metric) for seed, curves in seeds.items()}
            for arm, seeds in self.curves.items()
        }
        if baseline is not None and baseline not in by_label:
            raise ValueError(f"There is no arm {baseline!r} to compare with. There are {', '.join(by_label)}.")
        self.baselines = (
            _own_baselines(self.finals) if baseline is None else dict.fromkeys(self.finals, by_label[baseline])
        )

    @property
    def ranked(self) -> list[Arm]:
        """The arms, best mean first."""
        sign = 1 if self.minimize else -1
        return sorted(self.finals, key=lambda arm: sign * mean_interval(list(self.finals[arm].values())).mean)

    def interval(self, arm: Arm) -> Interval:
        """Mean and interval of an arm's final values."""
        return mean_interval(list(self.finals[arm].values()))

    def difference(self, arm: Arm) -> Difference:
        """Paired difference of an arm from its baseline, with no pairs if it has none."""
        baseline = self.baselines.get(arm)
        return paired_difference(self.finals[arm], {} if baseline is None else self.finals[baseline])

    @property
    def corrected(self) -> dict[Arm, float]:
        """Holm's p-values of the arms that are compared with a baseline, if there are several."""
        compared = [arm for arm in self.finals if self.baselines.get(arm) not in (arm, None)]
        raw = {arm: self.difference(arm).p for arm in compared}
        tested = {arm: p for arm, p in raw.items() if not math.isnan(p)}
        return dict(zip(tested, holm(list(tested.values())), strict=True)) if len(compared) > 1 else {}

    def write(self, directory: Path, *, command: str, missing: int = 0) -> None:
        """Write all files."""
        self._write_runs(directory / "runs.csv")
        self._write_curves(directory / "curves.csv")
        if self.choice is not None:
            rows = self.choice.table()
            _write_csv(directory / "tuning.csv", list(dict.fromkeys(key for row in rows for key in row)), rows)
        (directory / "report.md").write_text(self.markdown(command=command, missing=missing), encoding="utf-8")
        self._plot_curves(directory)
        self._plot_finals(directory)

    def markdown(self, *, command: str = "", missing: int = 0) -> str:
        """The table, how it was computed, and its limits."""
        labels = {arm.label for arm in self.baselines.values()}
        other = next(iter(labels)) if len(labels) == 1 else "its baseline"
        count = sum(map(len, self.finals.values()))
        lines = [f"# {self.metric} of {len(self.finals)} arms, {count} runs", ""]
        lines += [f"    {command}", ""] if command else []
        if missing:
            lines += [f"**{missing} runs are not in it**: they failed or have not run.", ""]
        interval = "95% interval"
        corrected = self.corrected
        titles = ["arm", "seeds", self.metric, interval, f"minus {other}", interval, "p"]
        titles += [*(["p (Holm)"] if corrected else []), "reading", "tokens", "length", "entropy"]
        titles += ["tuned"] if self.choice else []
        lines += markdown_table(titles, [self._row(arm, corrected) for arm in self.ranked], numbers=False)
        budgets = [self._tokens(arm) for arm in self.finals]
        if max(budgets) > _UNLIKE * min(budgets):
            lines += ["", f"**Budgets differ**: from {min(budgets):,.0f} to {max(budgets):,.0f} tokens per run."]
        final = "last tenth of the steps" if self.metric.startswith("train/") else "last evaluation"
        notes = (
            f"Final value: {final}, mean over seeds with Student's interval. Differences are paired by seed, with "
            f"Student's interval and the sign-flip permutation test. With n seeds its p-value is at least 2 / 2^n. "
            f"At 95%, one in twenty arms that equal {other} would seem to differ. Tokens: sampled in training, per "
            "run. Length (tokens) and entropy (nats per token): last tenth of the steps."
        )
        if corrected:
            notes += (
                f" p (Holm) is corrected for {len(corrected)} comparisons: read it when you choose among the arms by "
                "their p. The reading is of each arm alone."
            )
        if len(labels) > 1:
            notes += " The baseline of an arm is the GRPO arm whose other settings are the same."
        tuning = [] if self.choice is None else self.choice.markdown()
        return "\n".join([*lines, "", notes, *tuning, ""])

    def _row(self, arm: Arm, corrected: Mapping[Arm, float]) -> list[str]:
        own, difference = self.interval(arm), self.difference(arm)
        blank = [""] if corrected else []
        cells = [arm.label, str(len(self.finals[arm])), f"{own.mean:.4f}", _bounds(own)]
        if self.baselines.get(arm) is arm:
            cells += ["", "", "", *blank, "baseline"]
        elif not difference.pairs:
            cells += ["", "", "", *blank, "no pairs" if arm in self.baselines else "no baseline"]
        else:
            p = "" if math.isnan(difference.p) else f"{difference.p:.3f}"
            cells += [
                f"{difference.mean:+.4f}",
                _bounds(difference, "+"),
                p,
                *([f"{corrected[arm]:.3f}"] if arm in corrected else blank),
                difference.reading(minimize=self.minimize),
            ]
        cells += [f"{self._tokens(arm):,.0f}", *(self._secondary(arm, name) for name in reversed(_SECONDARY))]
        return [*cells, settings_text(arm.tuned)] if self.choice else cells

    def _tokens(self, arm: Arm) -> float:
        """Tokens that an arm's run sampled, mean over seeds."""
        seeds = self.curves[arm].values()
        return sum(map(total_tokens, seeds)) / len(seeds)

    def _secondary(self, arm: Arm, name: str) -> str:
        values = [final_value(curves, name) for curves in self.curves[arm].values()]
        return f"{sum(values) / len(values):.3g}"

    def _write_runs(self, path: Path) -> None:
        keys = list(dict.fromkeys(key for arm in self.finals for key in arm.settings | arm.tuned))
        rows: list[dict[str, Any]] = [
            {"arm": arm.label, **arm.settings, **arm.tuned, "seed": seed, self.metric: value}
            | {"rollout_tokens": int(total_tokens(self.curves[arm][seed]))}
            | {name: final_value(self.curves[arm][seed], name) for name in _SECONDARY}
            for arm, seeds in self.finals.items()
            for seed, value in seeds.items()
        ]
        _write_csv(path, ["arm", *keys, "seed", self.metric, "rollout_tokens", *_SECONDARY], rows)

    def _write_curves(self, path: Path) -> None:
        names = list(dict.fromkeys([self._curve, self.metric, *_SECONDARY]))
        rows = []
        for arm, seeds in self.curves.items():
            for seed, curves in seeds.items():
                columns = {name: dict(zip(*curves[name], strict=True)) for name in names if name in curves}
                steps = sorted(set().union(*columns.values()))
                rows += [
                    {"arm": arm.label, "seed": seed, "step": int(step), "rollout_tokens": round(tokens)}
                    | {name: column.get(step) for name, column in columns.items()}
                    for step, tokens in zip(steps, tokens_at(curves, np.asarray(steps)), strict=True)
                ]
        _write_csv(path, ["arm", "seed", "step", "rollout_tokens", *names], rows)

    @property
    def _curve(self) -> str:
        """What the learning curve shows: the metric itself, or the one that training logs for it at every step."""
        if self.metric.startswith("train/"):
            return self.metric
        own = f"train/{self.metric.partition('/')[2]}"
        return next(filter(self._in_all, (own, "train/accuracy")), "train/reward")

    def _in_all(self, name: str) -> bool:
        return all(name in curves for seeds in self.curves.values() for curves in seeds.values())

    def _plot_curves(self, directory: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(15, 5), layout="constrained")
        shown = self._shown()
        for place, name in enumerate((self._curve, *_SECONDARY)):
            axes = figure.add_subplot(1, 3, place + 1, xlabel="rollout tokens", ylabel=name)
            for color, arm in enumerate(shown):
                seeds = [(tokens_at(each, each[name][0]), each[name][1]) for each in self.curves[arm].values()]
                x, mean, low, high = band(seeds)
                axes.plot(x, mean, color=f"C{color}", label=arm.label, linestyle="-" if _pairwise(arm) else "--")
                axes.fill_between(x, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
            axes.grid(alpha=0.3)
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small"
        )
        omitted = len(self.finals) - len(shown)
        figure.suptitle(
            "mean over seeds, bootstrap 95% band" + (f", without {omitted} arms between these" if omitted else ""),
            fontsize="medium",
        )
        _save(figure, directory / "curves")

    def _plot_finals(self, directory: Path) -> None:
        from matplotlib.figure import Figure

        ranked = self.ranked[::-1]
        figure = Figure(figsize=(9, 1.5 + 0.3 * len(ranked)), layout="constrained")
        axes = figure.add_subplot(xlabel=f"{self.metric}, mean over seeds with 95% interval, one dot per seed")
        for height, arm in enumerate(ranked):
            own = self.interval(arm)
            color = "C0" if _pairwise(arm) else "C1"
            if not math.isnan(own.low):
                axes.plot([own.low, own.high], [height, height], color=color, linewidth=2)
            axes.plot(own.mean, height, "o", color=color)
            axes.plot(list(self.finals[arm].values()), [height] * len(self.finals[arm]), ".", color="0.6", markersize=4)
        for baseline in dict.fromkeys(self.baselines.values()):
            axes.axvline(self.interval(baseline).mean, color="0.5", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(ranked)), [arm.label for arm in ranked])
        axes.grid(axis="x", alpha=0.3)
        _save(figure, directory / "finals")

    def _shown(self) -> list[Arm]:
        """The arms that a plot of curves has room for: baselines, then the best and the last."""
        ranked = self.ranked
        if len(ranked) <= _MOST_CURVES:
            return ranked
        fixed = [arm for arm in ranked if not _pairwise(arm) or self.baselines.get(arm) is arm][: _MOST_CURVES - 2]
        pairwise = [arm for arm in ranked if arm not in fixed]
        best = pairwise[: _MOST_CURVES - len(fixed) - 1]
        return [arm for arm in ranked if arm in (*fixed, *best, pairwise[-1])]


def _own_baselines(arms: Collection[Arm]) -> dict[Arm, Arm]:
    """Arm -> the GRPO arm with the same other settings, or the first arm for all if no arm is GRPO."""
    baselines = [arm for arm in arms if arm.settings.get(ESTIMATOR) == "grpo"]
    if not baselines:
        return dict.fromkeys(arms, next(iter(arms)))
    return {
        arm: baseline
        for arm in arms
        for baseline in baselines
        if all(key == ESTIMATOR or arm.settings.get(key) == value for key, value in baseline.settings.items())
    }


def _pairwise(arm: Arm) -> bool:
    return bool(arm.settings.get(ESTIMATOR, "lambda") == "lambda")


def _bounds(interval: Interval, sign: str = "") -> str:
    if math.isnan(interval.low):
        return ""
    return f"{interval.low:{sign}.4f} to {interval.high:{sign}.4f}"


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"), dpi=110)
    figure.savefig(path.with_suffix(".svg"))
