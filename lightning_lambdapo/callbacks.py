"""Callbacks that write a run's files; they see what a training step returns, never how it came about."""

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich import get_console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_lambdapo.datatypes import PromptBatch, Rollout, Scores
from lightning_lambdapo.parallel import flattens, full_state_dict, gather_objects, is_sharded
from lightning_lambdapo.policy import Policy
from lightning_lambdapo.publishing import publish
from lightning_lambdapo.run_files import read_config
from lightning_lambdapo.tables import group_table, markdown_table, plain_rows, shorten, telling_group


def run_directory(trainer: Trainer) -> Path:
    """Where a run's files go: the logger's version directory, or ``default_root_dir`` without a logger.

    For rank 0: only that one knows the version. (``Trainer.log_dir`` says the same, and is a collective.)
    """
    for logger in trainer.loggers:
        directory = getattr(logger, "log_dir", None) or logger.save_dir
        if directory:
            return Path(directory)
    return Path(trainer.default_root_dir)


def finished_rollouts(trainer: Trainer) -> int:
    """Training steps that have been made, the present one included where it has just ended.

    (Lightning's ``total_batch_idx`` also counts a step that an exception ended and a resumed run does again.)
    """
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)


def _new_file(directory: Path, name: str) -> Path:
    """Path of a file that does not exist yet: an earlier run's file is never written over."""
    directory.mkdir(parents=True, exist_ok=True)
    stem, suffix = Path(name).stem, Path(name).suffix
    candidates = (directory / (name if count == 0 else f"{stem}-{count}{suffix}") for count in range(10**6))
    return next(path for path in candidates if not path.exists())


class CompletionsLogger(Callback):
    """Writes completions to JSONL, all of them or every few steps, and shows a group as a table every few steps.

    Training completions go to ``completions.jsonl``: step, prompt_id, sample, prompt, completion, every reward part,
    total, policy score, advantage, valid, truncated. ``Trainer.predict`` writes ``predictions.jsonl``.

    Args:
        every_n_rollouts: write the completions of every this many training steps.
        table_every_n_rollouts: show the first group whose rewards differ as a table every this many training steps, in
            the terminal and by TensorBoard's and W&B's loggers; 0 never.
    """

    def __init__(self, every_n_rollouts: int = 1, table_every_n_rollouts: int = 0) -> None:
        if every_n_rollouts < 1 or table_every_n_rollouts < 0:
            raise ValueError(
                "`every_n_rollouts` must be at least 1 and `table_every_n_rollouts` at least 0, got "
                f"{every_n_rollouts} and {table_every_n_rollouts}."
            )
        self.every_n_rollouts = every_n_rollouts
        self.table_every_n_rollouts = table_every_n_rollouts
        self._path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a new file with every run."""
        self._path = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Write one line per completion of this step, of all ranks."""
        step = finished_rollouts(trainer)
        table = self.table_every_n_rollouts and step % self.table_every_n_rollouts == 0
        if step % self.every_n_rollouts and not table:
            return
        records = [{"step": step, **record} for record in _training_records(outputs)]
        everyone = [record for part in gather_objects(records) for record in part]
        if trainer.is_global_zero:
            if step % self.every_n_rollouts == 0:
                self._write(trainer, "completions.jsonl", everyone)
            if table:
                _show_group(trainer, step, telling_group(everyone))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one line per predicted completion, of all ranks."""
        everyone = [record for part in gather_objects(outputs) for record in part]
        if trainer.is_global_zero:
            self._write(trainer, "predictions.jsonl", everyone)

    def _write(self, trainer: Trainer, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        if self._path is None:
            self._path = _new_file(run_directory(trainer), name)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, default=str) + "\n" for record in records)


def _training_records(outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    rollout: Rollout = outputs["rollout"]
    scores: Scores = outputs["scores"]
    columns: dict[str, list[Any]] = {
        "total": scores.total.flatten().tolist(),
        "score": outputs["policy_scores"].flatten().tolist(),
        "advantage": outputs["advantages"].flatten().tolist(),
        "valid": scores.valid.flatten().tolist(),
    }
    parts = {name: part.flatten().tolist() for name, part in scores.parts.items()}
    return [
        record
        | {"rewards": {name: None if part[row] != part[row] else part[row] for name, part in parts.items()}}
        | {name: column[row] for name, column in columns.items()}
        for row, record in enumerate(rollout.records(outputs["batch"]))
    ]


def _show_group(trainer: Trainer, step: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Print a group, and give it to the loggers that have a place for tables, beside the step's other values."""
    console = get_console()
    console.print(Text(f"step {step}, prompt {records[0]['prompt_id']}: {shorten(records[0]['prompt'], 300)}", "bold"))
    console.print(group_table(records, width=console.width))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("completions", markdown_table(records), step - 1)
        elif isinstance(logger, WandbLogger):
            columns, rows = plain_rows(records)
            logger.log_table("completions", columns=columns, data=rows, step=step - 1)


class RewardPlot(Callback):
    """Keeps ``reward.png`` up to date: reward, accuracy and density against rollout steps.

    Args:
        every_n_rollouts: redraw every this many training steps; the end of training always draws.
        metrics: the logged keys to draw; those that are not logged are left out.
    """

    def __init__(
        self,
        every_n_rollouts: int = 20,
        metrics: Sequence[str] = ("train/reward", "train/accuracy", "train/density_f", "val/pass_at_1"),
    ) -> None:
        if every_n_rollouts < 1:
            raise ValueError(f"`every_n_rollouts` must be at least 1, got {every_n_rollouts}.")
        self.every_n_rollouts = every_n_rollouts
        self.metrics = tuple(metrics)
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._path: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, so that a resumed run draws the whole of them."""
        return {"curves": {name: [list(point) for point in curve] for name, curve in self._curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the curves of the interrupted run."""
        self._curves = {name: [(x, y) for x, y in curve] for name, curve in state_dict["curves"].items()}

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Note the step's values."""
        self._note(trainer, "train/")
        if finished_rollouts(trainer) % self.every_n_rollouts == 0:
            self._draw(trainer)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the validation's values."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._note(trainer, "val/")

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the final picture."""
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
            if not name.startswith("train/"):  # few points, perhaps one: each is to be seen
                axes.plot(x, y, "o--", label=name)
                continue
            (line,) = axes.plot(x, y, alpha=0.3)
            window = max(1, len(y) // 12)
            smooth = [sum(y[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(y))]
            axes.plot(x, smooth, color=line.get_color(), label=name)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        axes.grid(alpha=0.3)
        if self._path is None:
            self._path = _new_file(run_directory(trainer), "reward.png")
        canvas.print_png(self._path)


class Throughput(Callback):
    """Logs ``train/step_seconds`` and ``train/tokens_per_second``, the sampled tokens of all ranks over it."""

    def __init__(self) -> None:
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Stop the clock and log."""
        seconds = time.perf_counter() - self._start
        tokens = sum(gather_objects(int(outputs["rollout"].lengths.sum())))
        pl_module.log("train/step_seconds", seconds)
        pl_module.log("train/tokens_per_second", tokens / seconds)


class PolicyExport(Callback):
    """Writes the trained policy to ``export/`` when training ends, as ``lambdapo export`` does: adapter or whole model.

    Args:
        directory: where to; relative to the run's directory.
    """

    def __init__(self, directory: str = "export") -> None:
        self.directory = directory

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be exported before training rather than after it."""
        if flattens(trainer.strategy):
            raise ValueError(
                f"PolicyExport cannot gather the shards of {type(trainer.strategy).__name__}; leave it out, or use "
                "ModelParallelStrategy."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights where they are in shards, and write the export on rank 0."""
        policy, tokenizer = cast(Policy, pl_module.policy), cast(PreTrainedTokenizerBase, pl_module.tokenizer)
        weights = full_state_dict(policy) if is_sharded(trainer.strategy) else None
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # what it has not written yet belongs to the results
            run = run_directory(trainer)
            publish(
                policy,
                tokenizer,
                _new_file(run, self.directory),
                settings=pl_module.hparams,
                config=read_config(run),
                run=run,
                steps=finished_rollouts(trainer),
                weights=weights,
            )


class RolloutCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that counts rollouts.

    Under manual optimisation Lightning's own counts optimizer updates, warns at each save and never honours
    ``train_time_interval``. ``ckpt_path="last"`` also finds the last checkpoint of the logger's earlier versions, so
    that the same command line takes up an interrupted run. With several ranks ``save_on_exception`` saves on SIGTERM,
    which all of them stop at together; another exception may be one rank's alone, and saving takes all of them.
    With a ``monitor`` that validation logs, the best are chosen, and saved, when a validation ends; the last is saved
    when it is due. Everything else, ``save_top_k``, ``mode``, ``save_last``, is its parent's.

    Args:
        every_n_rollouts: save after every this many training steps.
        train_time_interval: or whenever this much time has passed since the last save.
        **kwargs: as for ``ModelCheckpoint``, but for ``every_n_train_steps`` and ``every_n_epochs``.
    """

    def __init__(
        self, every_n_rollouts: int | None = None, train_time_interval: timedelta | None = None, **kwargs: Any
    ) -> None:
        if (every_n_rollouts is None) == (train_time_interval is None):
            raise ValueError("Give exactly one of `every_n_rollouts` and `train_time_interval`.")
        if every_n_rollouts is not None and every_n_rollouts < 1:
            raise ValueError(f"`every_n_rollouts` must be at least 1, got {every_n_rollouts}.")
        super().__init__(**{"filename": "rollout-{step}", "save_last": True, **kwargs}, every_n_epochs=0)
        self.every_n_rollouts = every_n_rollouts
        self.interval = train_time_interval
        self._saved_at = time.monotonic()
        self._awaits_score = False
        self._trained: set[str] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Save when a rollout count or an interval is reached."""
        if self.every_n_rollouts is not None:
            due = finished_rollouts(trainer) % self.every_n_rollouts == 0
        else:
            passed = time.monotonic() - self._saved_at >= (self.interval or timedelta()).total_seconds()
            due = bool(trainer.strategy.broadcast(passed))  # clocks differ between ranks; saving is a collective
        self._trained |= {each.meta.name for each in (trainer._results or {}).values()}
        if due and not self._should_skip_saving_checkpoint(trainer):
            candidates: dict[str, Tensor] = self._monitor_candidates(trainer)
            self._awaits_score = self.monitor is not None and self.monitor not in self._trained
            if self.monitor is None or (not self._awaits_score and self.monitor in candidates):
                self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
            self._saved_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the weights that a validation's ``monitor`` is of, where a save has been due since the last one.

        Raises:
            MisconfigurationException: the validation did not log ``monitor``.
        """
        super().on_validation_end(trainer, pl_module)
        if self._awaits_score and trainer.state.fn == "fit" and not trainer.sanity_checking:
            candidates: dict[str, Tensor] = self._monitor_candidates(trainer)
            if self.monitor in candidates or str(self.monitor).startswith("val/"):
                self._awaits_score = False
                self._save_topk_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last where that has not been done, and warn where nothing could be the best."""
        super().on_train_end(trainer, pl_module)
        if self.monitor is not None and not self.best_model_path and trainer.is_global_zero:
            warnings.warn(
                f"RolloutCheckpoint(monitor={self.monitor!r}) saved no best checkpoint: nothing logged that when a "
                f"save was due. There are {', '.join(sorted(trainer.callback_metrics))}.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """What its parent keeps, and whether a save waits for the validation that comes next."""
        return {**super().state_dict(), "awaits_score": self._awaits_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as ``state_dict`` left off."""
        with warnings.catch_warnings():
            if self.monitor is None:  # there are no scores to lose
                warnings.filterwarnings("ignore", message="The dirpath has changed")
            super().load_state_dict(state_dict)
        self._awaits_score = state_dict.get("awaits_score", False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where all ranks can."""
        if trainer.world_size == 1 or isinstance(exception, SIGTERMException):
            super().on_exception(trainer, pl_module, exception)

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Candidates for ``ckpt_path="last"``: of this run's directory, else of the newest earlier version with any."""
        found = super()._find_last_checkpoints(trainer)
        if found or self.dirpath is not None or not trainer.loggers:
            return found
        versions = run_directory(trainer).parent
        return set(map(str, versions.glob(f"version_*/checkpoints/{self.CHECKPOINT_NAME_LAST}*.ckpt")))


__all__ = ["CompletionsLogger", "PolicyExport", "RewardPlot", "RolloutCheckpoint", "Throughput", "run_directory"]
