"""The directory of a run's files, and the run's progress."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger


def run_directory(trainer: Trainer) -> Path:
    """The directory of a run's files: the logger's version directory, or ``default_root_dir`` without a logger.

    Only for rank 0, because other ranks do not know the version. (``Trainer.log_dir`` is the same, but a collective.)
    """
    for logger in trainer.loggers:
        directory = getattr(logger, "log_dir", None) or logger.save_dir
        if directory:
            return Path(directory)
    return Path(trainer.default_root_dir)


def has_own_directory(trainer: Trainer) -> bool:
    """False if a run's directory may contain files of others: ``default_root_dir``, or what all runs of a logger share.

    Only for rank 0.
    """
    run = run_directory(trainer)
    logs = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
    return any(log and Path(log) == run for log in logs)


def entries(directory: Path) -> dict[str, int]:
    """Names in a directory, and when each was last changed. Those of directories end with a slash."""
    if not directory.is_dir():
        return {}
    found = {}
    for path in sorted(directory.iterdir()):
        with suppress(FileNotFoundError):  # somebody else may have removed it
            found[f"{path.name}/" if path.is_dir() else path.name] = path.lstat().st_mtime_ns
    return found


def finished_rollouts(trainer: Trainer) -> int:
    """Number of finished training steps, including one that has just ended.

    (Lightning's ``total_batch_idx`` also counts a step that an exception ended and that a resumed run repeats.)
    """
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)


def has_named_version(logger: Logger) -> bool:
    """True if a user has named the logger's run. Numbers, and the ids of hosted runs, are the logger's own."""
    return isinstance(logger, CSVLogger | TensorBoardLogger | WandbLogger) and isinstance(logger.version, str)
