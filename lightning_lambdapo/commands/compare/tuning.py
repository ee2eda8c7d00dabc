"""Settings that are tuned for each arm before arms are compared, on seeds that the comparison does not use."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lambdapo.commands.compare.plan import Arm, Run, candidates
from lightning_lambdapo.commands.compare.statistics import final_value, read_curves, total_tokens
from lightning_lambdapo.runs.text import markdown_table

#: Seeds of tuning runs follow this number. Those of the comparison are 1 to N, and never more.
LAST_SEED = 1000


@dataclass(frozen=True)
class Tuning:
    """The runs that choose each arm's values.

    Attributes:
        candidates: arm -> itself with every combination of tuned values.
        runs: the runs of all arms that have several.
        seeds: seeds of these runs.
    """

    candidates: dict[Arm, list[Arm]]
    runs: list[Run]
    seeds: list[int]

    @property
    def untuned(self) -> list[Arm]:
        """Arms for which there is nothing to choose, and so no run here."""
        return [dataclasses.replace(arm, tuned=own[0].tuned) for arm, own in self.candidates.items() if len(own) == 1]


def plan_tuning(
    arms: Sequence[Arm], alternatives: Sequence[Sequence[Mapping[str, Any]]], seeds: int, root: Path
) -> Tuning:
    """Every arm with every combination of tuned values, seed by seed.

    Args:
        arms: the arms of the comparison.
        alternatives: the values of each ``--tune``.
        seeds: how many.
        root: the comparison's directory.

    Raises:
        ValueError: no arm uses a tuned setting, or two values give the same directory.
    """
    numbers = list(range(LAST_SEED + 1, LAST_SEED + 1 + seeds))
    found = {arm: candidates(arm, alternatives) for arm in arms}
    keys = [key for alternative in alternatives for key in alternative[0]]
    for key in keys:
        if not any(key in each.tuned for own in found.values() for each in own):
            raise ValueError(f"--tune={key}: no arm uses this setting.")
    for own in found.values():
        slugs = [each.slug for each in own]
        if len(set(slugs)) < len(slugs):
            raise ValueError("Several tuned values would share a directory. Choose values with more distinct names.")
    runs = [
        Run(Arm(f"{arm.label}, {each.label}", each.settings, each.tuned), seed, directory / f"seed_{seed}")
        for seed in numbers
        for arm, own in found.items()
        if len(own) > 1
        for each in own
        for directory in [root / "tuning" / arm.slug / each.slug]
    ]
    return Tuning(found, runs, numbers)


class Choice:
    """What finished tuning runs choose: for each arm the values with the best mean over the tuning seeds.

    Args:
        tuning: its runs have all finished.
        metric: what is judged, as in the comparison. None takes the first of ``preferred`` that all runs logged.
        preferred: metrics.
        minimize: True where a smaller metric is better.

    Attributes:
        metric: what was judged.
        means: arm -> mean final value of each candidate. An arm with one candidate has none.
        tokens: tokens that the tuning runs sampled.

    Raises:
        ValueError: the metric was not logged, or an arm has no candidate with a value of it.
    """

    def __init__(self, tuning: Tuning, *, metric: str | None, preferred: Sequence[str], minimize: bool) -> None:
        curves = {run: read_curves(run.directory) for run in tuning.runs}
        logged = [name for name in preferred if all(name in each for each in curves.values())]
        self.metric = metric or (logged[0] if logged else preferred[-1])
        self.seeds = tuning.seeds
        self.tokens = sum(total_tokens(each) for each in curves.values())
        self.rows = [(run, final_value(each, self.metric)) for run, each in curves.items()]
        self.means: dict[Arm, list[tuple[Arm, float]]] = {}
        self.chosen: dict[Arm, Arm] = {}
        for arm, own in tuning.candidates.items():
            if len(own) == 1:
                self.chosen[arm] = own[0]
                continue
            self.means[arm] = [(each, self._mean(f"{arm.label}, {each.label}")) for each in own]
            known = [(mean, each) for each, mean in self.means[arm] if not math.isnan(mean)]
            if not known:
                raise ValueError(f"No tuning run of {arm.label} has a value of {self.metric} that is a number.")
            sign = 1 if minimize else -1
            self.chosen[arm] = min(known, key=lambda pair: sign * pair[0])[1]

    def _mean(self, label: str) -> float:
        values = [value for run, value in self.rows if run.arm.label == label]
        return sum(values) / len(values)

    @property
    def arms(self) -> list[Arm]:
        """The arms with their chosen values, in order."""
        return [dataclasses.replace(arm, tuned=chosen.tuned) for arm, chosen in self.chosen.items()]

    def markdown(self) -> list[str]:
        """The table of the tuning, and how values were chosen."""
        rows = [
            [arm.label, each.label, f"{mean:.4f}", "chosen" if each is self.chosen[arm] else ""]
            for arm, own in self.means.items()
            for each, mean in own
        ]
        seeds = f"seed {self.seeds[0]}" if len(self.seeds) == 1 else f"seeds {self.seeds[0]} to {self.seeds[-1]}"
        lines = ["", "## Tuning", "", *markdown_table(["arm", "value", self.metric, ""], rows, numbers=False), ""]
        edges = [arm.label for arm in self.means if self._at_an_edge(arm)]
        if edges:
            lines += [f"**At the edge of the values tried**: {', '.join(edges)}. Better values may lie beyond it.", ""]
        level = [arm.label for arm in self.means if self._is_level(arm)]
        if level:
            lines += [f"**Several values are equally good**: {', '.join(level)}. The first of them was taken.", ""]
        for arm in (each for each in self.chosen if each not in self.means):
            lines += [f"{arm.label} uses none of the tuned settings.", ""]
        note = (
            f"Each arm has the value with the best mean over {seeds}. The figures above are of other seeds. Prompts of "
            f"validation are the same. The tuning runs sampled {self.tokens:,.0f} tokens in all."
        )
        return [*lines, note]

    def _at_an_edge(self, arm: Arm) -> bool:
        """Whether a number was chosen that is the smallest or largest of three or more."""
        chosen = self.chosen[arm].tuned
        for key, value in chosen.items():
            tried = {each.tuned.get(key) for each, _ in self.means[arm] if isinstance(each.tuned.get(key), int | float)}
            numbers = sorted(number for number in tried if number is not None)
            if len(numbers) > 2 and value in (numbers[0], numbers[-1]):
                return True
        return False

    def _is_level(self, arm: Arm) -> bool:
        """Whether another value has the mean of the chosen one."""
        means = [mean for _, mean in self.means[arm]]
        return means.count(dict(self.means[arm])[self.chosen[arm]]) > 1

    def table(self) -> list[dict[str, Any]]:
        """One row for each tuning run."""
        return [
            {"arm": run.arm.label, **run.arm.settings, **run.arm.tuned, "seed": run.seed, self.metric: value}
            for run, value in self.rows
        ]
