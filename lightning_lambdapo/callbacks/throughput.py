"""Tokens per second."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_lambdapo.datatypes import PromptBatch
from lightning_lambdapo.distributed.parallel import gather_objects


class Throughput(Callback):
    """Logs ``train/step_seconds`` and ``train/tokens_per_second``, which counts the sampled tokens of all ranks."""

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
