"""Where a run's files go, and how far the run is."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


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
