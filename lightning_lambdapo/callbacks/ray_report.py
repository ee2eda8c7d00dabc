"""Metrics and checkpoints for Ray Train."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_lambdapo.callbacks.run import finished_rollouts
from lightning_lambdapo.datatypes import PromptBatch
from lightning_lambdapo.distributed.parallel import saves_shards
from lightning_lambdapo.distributed.ray_train import CHECKPOINT_NAME, prepare_trainer
from lightning_lambdapo.functional.ranges import check_whole


class RayReport(Checkpoint):
    """Reports metrics and a checkpoint to Ray Train every few rollouts, and once more when training ends.

    Ray copies the checkpoint to its storage before training continues. A run that Ray starts again resumes from it with
    :func:`~lightning_lambdapo.distributed.ray_train.resume_path`. Ray's own callback reports when an epoch ends.

    The metrics are those that were logged last, with ``epoch`` and, as ``step``, the number of finished rollouts. If a
    validation follows the step, its metrics are part of the next report.

    Args:
        every_n_rollouts: report every this many training steps.
        directory: where a checkpoint is written before Ray copies it. None uses the temporary directory of rank 0's
            machine. Shards of workers on several machines need a directory that all of them share.
    """

    def __init__(self, every_n_rollouts: int, directory: str | Path | None = None) -> None:
        check_whole("every_n_rollouts", every_n_rollouts, 1)
        self.every_n_rollouts = every_n_rollouts
        self.directory = directory
        self._reported = 0
        self._epoch = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer that is not one for Ray, and shards that no directory would collect.

        Raises:
            ValueError: see there.
        """
        import ray.train

        prepare_trainer(trainer)
        context = ray.train.get_context()
        together = context.get_local_world_size() == context.get_world_size()
        if self.directory is None and not together and saves_shards(trainer.strategy):
            raise ValueError(
                f"The {context.get_world_size()} workers write a checkpoint in shards and are on several machines. Set "
                "RayReport(directory=...) to a directory that all machines share, or "
                "save_distributed_checkpoint=False (state_dict_type='full' under FSDP1)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a resumed run begins with is reported already."""
        self._reported = finished_rollouts(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Report if it is due."""
        self._epoch = trainer.current_epoch  # when training has ended it is the next one
        if finished_rollouts(trainer) % self.every_n_rollouts == 0:
            self._report(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last rollouts, if that is not done."""
        if finished_rollouts(trainer) != self._reported:
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        """Save and report. A collective, of Ray as well: each rank reports, and rank 0 reports the checkpoint."""
        import ray.train

        self._reported = finished_rollouts(trainer)
        metrics: dict[str, float] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics |= {"epoch": self._epoch, "step": self._reported}
        made = tempfile.mkdtemp(prefix="lambdapo-", dir=self.directory) if trainer.is_global_zero else ""
        directory = Path(trainer.strategy.broadcast(made))
        try:
            trainer.save_checkpoint(directory / CHECKPOINT_NAME, weights_only=False)
            checkpoint = ray.train.Checkpoint.from_directory(str(directory)) if trainer.is_global_zero else None
            ray.train.report(metrics, checkpoint=checkpoint)
        finally:
            if trainer.is_global_zero:
                shutil.rmtree(directory, ignore_errors=True)
