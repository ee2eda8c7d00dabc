"""Completions as JSONL and as tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console
from rich.text import Text

from lightning_lambdapo.callbacks.run import finished_rollouts, run_directory
from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed.parallel import gather_on_first_rank
from lightning_lambdapo.functional.ranges import check_whole
from lightning_lambdapo.runs.files import unused_path
from lightning_lambdapo.runs.tables import group_table, markdown_group, plain_rows, shorten, telling_group


class CompletionsLogger(Callback):
    """Writes completions to JSONL, and shows a group as a table every few steps.

    Training completions go to ``completions.jsonl``: step, prompt_id, sample, prompt, completion, every reward part,
    total, score (the policy's confidence), advantage, valid, truncated. ``Trainer.predict`` writes
    ``predictions.jsonl``.

    Args:
        every_n_rollouts: write the completions of every this many training steps.
        table_every_n_rollouts: show the first group whose rewards differ as a table every this many training steps, in
            the terminal and with the loggers of TensorBoard and W&B. 0 shows none.
    """

    def __init__(self, every_n_rollouts: int = 1, table_every_n_rollouts: int = 0) -> None:
        check_whole("every_n_rollouts", every_n_rollouts, 1)
        check_whole("table_every_n_rollouts", table_every_n_rollouts, 0)
        self.every_n_rollouts = every_n_rollouts
        self.table_every_n_rollouts = table_every_n_rollouts
        self._path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a new file for every run."""
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
        everyone = [record for part in gather_on_first_rank(records) for record in part]
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
        everyone = [record for part in gather_on_first_rank(outputs) for record in part]
        if trainer.is_global_zero:
            self._write(trainer, "predictions.jsonl", everyone)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the predictions are."""
        if self._path is not None:
            rank_zero_info(f"The predictions are in {self._path}.")

    def _write(self, trainer: Trainer, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        if self._path is None:
            self._path = unused_path(run_directory(trainer) / name)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, default=str) + "\n" for record in records)


def _training_records(outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    rollout: Rollout = outputs["rollout"]
    rewards: RewardOutcome = outputs["rewards"]
    columns: dict[str, list[Any]] = {
        "total": rewards.total.flatten().tolist(),
        "score": outputs["confidence"].flatten().tolist(),
        "advantage": outputs["advantages"].flatten().tolist(),
        "valid": rewards.valid.flatten().tolist(),
    }
    parts = {name: part.flatten().tolist() for name, part in rewards.parts.items()}
    return [
        record
        | {"rewards": {name: None if part[row] != part[row] else part[row] for name, part in parts.items()}}
        | {name: column[row] for name, column in columns.items()}
        for row, record in enumerate(rollout.records(outputs["batch"]))
    ]


def _show_group(trainer: Trainer, step: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Print a group, and log it with the loggers that support tables, under the same step as the other values."""
    console = get_console()
    console.print(Text(f"step {step}, prompt {records[0]['prompt_id']}: {shorten(records[0]['prompt'], 300)}", "bold"))
    console.print(group_table(records, width=console.width))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("completions", markdown_group(records), step - 1)
        elif isinstance(logger, WandbLogger):
            columns, rows = plain_rows(records)
            logger.log_table("completions", columns=columns, data=rows, step=step - 1)
