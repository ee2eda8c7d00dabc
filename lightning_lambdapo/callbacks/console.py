"""What a training run prints in the terminal: a progress bar with the main figures, and a summary at the end."""

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich import box, get_console
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from lightning_lambdapo.callbacks.run import entries, finished_rollouts, has_own_directory, run_directory
from lightning_lambdapo.functional.ranges import check_whole
from lightning_lambdapo.runs.files import CHECKPOINTS, first_and_last
from lightning_lambdapo.runs.text import clock, metric_label, thousands

#: Logged key, name in the bar, name in the summary, decimals.
_FIGURES = (
    ("train/reward", "reward", "reward", 3),
    ("train/accuracy", "acc", "accuracy", 3),
    ("train/density_f", "dens", "density F", 3),
    ("train/entropy", "ent", "entropy", 3),
    ("train/completion_length", "len", "length", 1),
)
_WINDOW = 20
#: Directories in which a run writes among files of earlier ones.
_DIRECTORIES = ("checkpoints/", "export/")


class TrainingConsole(ProgressBar):
    """A progress bar with reward, accuracy, density, entropy, length, tokens/s and time left, and a summary at the end.

    If the output is not a terminal but, for example, a log file, it prints a line of the same figures every few steps.

    Args:
        every_n_rollouts: print a line every this many training steps, if there is no terminal.
    """

    def __init__(self, every_n_rollouts: int = 10) -> None:
        super().__init__()
        check_whole("every_n_rollouts", every_n_rollouts, 1)
        self.every_n_rollouts = every_n_rollouts
        self._enabled = True
        self._bars: _Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._curves: dict[str, list[float]] = {}
        self._evaluations: dict[str, list[tuple[int, float]]] = {}
        self._steps: list[int] = []
        self._others: dict[str, int] = {}
        self._tokens = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._began = self._step_began = 0.0

    # -- Lightning's interface of a progress bar -----------------------------------------------------------------------

    def disable(self) -> None:
        """Print nothing. Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._enabled:
            get_console().print(*args, **kwargs)

    # -- training ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what a directory that is not the run's own already contains."""
        super().setup(trainer, pl_module, stage)
        if self._enabled and stage == "fit":
            self._others = {} if has_own_directory(trainer) else entries(run_directory(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the bar."""
        self._curves, self._evaluations, self._steps, self._tokens = {}, {}, [], 0
        self._recent.clear()
        self._began = time.perf_counter()
        self._show("train", _total_steps(trainer, pl_module), completed=finished_rollouts(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the step's clock."""
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step's figures."""
        if not self._enabled:
            return
        step, total = finished_rollouts(trainer), _total_steps(trainer, pl_module)
        self._note(trainer, step, outputs)
        now = time.perf_counter()
        left = (now - self._began) / len(self._steps) * (total - step)
        figures = self._figures()
        if self._bars is not None:
            self._bars.figures = figures
            remaining = f"{clock(left)} left" if math.isfinite(left) else ""
            self._bars.update(self._tasks["train"], completed=step, left=remaining)
        elif step % self.every_n_rollouts == 0 or len(self._steps) == 1 or step == total:
            place = f"step {step}/{total}" if math.isfinite(total) else f"step {step}"
            rest = f"  {clock(left)} left" if math.isfinite(left) and step < total else ""
            self.print(Text.assemble(f"{place}  ", figures, rest), soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self._stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary, after all callbacks have written their files."""
        self._stop()
        if self._enabled and self._steps:
            seconds = time.perf_counter() - self._began
            rate = thousands(self._tokens / max(seconds, 1e-9))
            counts = (
                f"{len(self._steps)} steps in {clock(seconds)}, {self._tokens:,} tokens sampled ({rate} per second)"
            )
            self.print()
            self.print(Text(counts, "bold"), soft_wrap=True)
            self.print(self._summary())
            if files := _files(run_directory(trainer), self._others):
                self.print(files, soft_wrap=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar before the error is printed."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the bar in any case."""
        self._stop()

    # -- validation, test, prediction ----------------------------------------------------------------------------------

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance validation's own bar."""
        checking = trainer.sanity_checking
        totals = trainer.num_sanity_val_batches if checking else trainer.num_val_batches
        self._show("check" if checking else "val", totals[dataloader_idx], completed=batch_idx + 1)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar of the sanity check."""
        self._hide("check")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the results of the validation."""
        self._hide("val")
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self._enabled:
            return
        step = finished_rollouts(trainer)
        found = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name == "val/reward" or (name.startswith("val/") and "_at_" in name)
        }
        for name, value in found.items():
            self._evaluations.setdefault(name, []).append((step, value))
        if found:
            figures = [(metric_label(name.removeprefix("val/")), f"{value:.3f}") for name, value in found.items()]
            self.print(Text.assemble((f"val at step {step}  ", "bold"), _line(figures)), soft_wrap=True)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance the test's bar."""
        self._show("test", trainer.num_test_batches[dataloader_idx], completed=batch_idx + 1)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance the prediction's bar."""
        self._show("predict", trainer.num_predict_batches[dataloader_idx], completed=batch_idx + 1)

    on_test_end = on_predict_end = on_train_end

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _show(self, name: str, total: float, *, completed: int) -> None:
        if not self._enabled or not get_console().is_terminal:
            return
        if self._bars is None:
            self._bars = _Bars()
            self._bars.start()
        bounded = total if math.isfinite(total) else None
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=bounded, left="")
        self._bars.update(self._tasks[name], total=bounded, completed=completed)

    def _hide(self, name: str) -> None:
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    def _note(self, trainer: Trainer, step: int, outputs: Any) -> None:
        metrics = trainer.callback_metrics
        self._steps.append(step)
        for key, *_ in _FIGURES:
            if key in metrics:
                self._curves.setdefault(key, []).append(float(metrics[key]))
        counted = metrics.get("train/rollout_tokens")  # of all ranks
        tokens = int(outputs["rollout"].lengths.sum() if counted is None else counted)
        self._tokens += tokens
        self._recent.append((tokens, time.perf_counter() - self._step_began))

    def _figures(self) -> Text:
        figures = [
            (short, f"{self._curves[key][-1]:.{decimals}f}")
            for key, short, _, decimals in _FIGURES
            if key in self._curves
        ]
        tokens, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        return Text.assemble(_line(figures), f"  {thousands(tokens / max(seconds, 1e-9))} tok/s")

    def _summary(self) -> Table:
        count = math.ceil(len(self._steps) / 10)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("")
        steps = f"{count} steps" if count > 1 else "step"
        for header in (f"first {steps}", f"last {steps}", "change"):
            table.add_column(header, justify="right")
        for key, _, name, decimals in _FIGURES:
            ends = first_and_last(self._curves.get(key, []))
            if ends is not None:
                _add_row(table, name, *ends, decimals)
        for key, points in self._evaluations.items():
            name = f"val {metric_label(key.removeprefix('val/'))}"
            _add_row(table, f"{name} (step {points[0][0]}, {points[-1][0]})", points[0][1], points[-1][1], 3)
        return table


class _Bars(Progress):
    """One bar per task, and a line of figures below them."""

    def __init__(self) -> None:
        self.figures = Text()
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=get_console(),
            transient=True,
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, then the figures."""
        yield from super().get_renderables()
        yield self.figures


def _total_steps(trainer: Trainer, pl_module: LightningModule) -> float:
    """Number of rollout steps at the end of the run, or infinity if it has no limit."""
    by_epochs = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        by_epochs = trainer.num_training_batches * trainer.max_epochs
    if trainer.max_steps < 0:
        return by_epochs
    return min(by_epochs, math.ceil(trainer.max_steps / cast(int, getattr(pl_module, "updates_per_rollout", 1))))


def _files(run: Path, others: Mapping[str, int] = MappingProxyType({})) -> Text:
    """The run's files, and the commands to use them with. ``others`` are entries that were there before it."""
    place = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    names = [
        name
        for name, changed in entries(run).items()
        if name not in others or (name in _DIRECTORIES and changed != others[name])
    ]
    rows = [("files", f"{place}: {', '.join(names)}")] if names else []
    if "completions.jsonl" in names:
        rows.append(("inspect", f"lambdapo inspect-rollout {place}"))
    if "checkpoints/" in names and next(run.glob(CHECKPOINTS), None) is not None:
        rows.append(("export", f"lambdapo export {place}"))
    return Text("\n").join(Text.assemble((f"{label:9}", "bold"), value) for label, value in rows)


def _add_row(table: Table, name: str, first: float, last: float, decimals: int) -> None:
    table.add_row(name, *(f"{value:.{decimals}f}" for value in (first, last)), f"{last - first:+.{decimals}f}")


def _line(figures: Iterable[tuple[str, str]]) -> Text:
    parts = [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in figures]
    return Text("  ").join(parts)
