"""A plot of reward, accuracy and density."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_lambdapo.callbacks.run import finished_rollouts, run_directory
from lightning_lambdapo.datatypes import PromptBatch
from lightning_lambdapo.functional.ranges import check_whole
from lightning_lambdapo.runs.files import unused_path


class RewardPlot(Callback):
    """Keeps ``reward.png`` up to date: reward, accuracy and density against rollout steps.

    Args:
        every_n_rollouts: redraw every this many training steps, and at the end of training.
        metrics: the logged keys to draw. Keys that are not logged are omitted.
    """

    def __init__(
        self,
        every_n_rollouts: int = 20,
        metrics: Sequence[str] = ("train/reward", "train/accuracy", "train/density_f", "val/pass_at_1"),
    ) -> None:
        check_whole("every_n_rollouts", every_n_rollouts, 1)
        self.every_n_rollouts = every_n_rollouts
        self.metrics = tuple(metrics)
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._path: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, so that a resumed run draws them whole."""
        return {"curves": {name: [list(point) for point in curve] for name, curve in self._curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the curves of the interrupted run."""
        self._curves = {name: [(x, y) for x, y in curve] for name, curve in state_dict["curves"].items()}

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Record the step's values."""
        self._note(trainer, "train/")
        if finished_rollouts(trainer) % self.every_n_rollouts == 0:
            self._draw(trainer)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the validation's values."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._note(trainer, "val/")

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the final plot."""
        self._draw(trainer)

    def _note(self, trainer: Trainer, prefix: str) -> None:
        step = finished_rollouts(trainer)
        for name in self.metrics:
            if name.startswith(prefix) and name in trainer.callback_metrics:
                self._curves.setdefault(name, []).append((step, float(trainer.callback_metrics[name])))

    def _draw(self, trainer: Trainer) -> None:
        if not self._curves:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="rollout step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for name, curve in self._curves.items():
            x, y = zip(*curve, strict=True)
            if not name.startswith("train/"):  # few points, perhaps one, so each gets a marker
                axes.plot(x, y, "o--", label=name)
                continue
            (line,) = axes.plot(x, y, alpha=0.3)
            window = max(1, len(y) // 12)
            smooth = [sum(y[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(y))]
            axes.plot(x, smooth, color=line.get_color(), label=name)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        axes.grid(alpha=0.3)
        if self._path is None:
            self._path = unused_path(run_directory(trainer) / "reward.png")
        canvas.print_png(self._path)
