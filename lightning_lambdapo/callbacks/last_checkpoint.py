"""Which checkpoint ``ckpt_path="last"`` means, and what happens where it is not there."""

from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_lambdapo.callbacks.run import has_named_version
from lightning_lambdapo.checkpointing.files import CheckpointError


class LastCheckpoint(Callback):
    """With ``ckpt_path="last"`` only ``fit`` may begin without a checkpoint, and then says so.

    Lightning itself warns, and evaluates a model that was not trained. A run whose callback saves no last checkpoint
    is not begun anew where others could be resumed from.

    Attributes:
        asked: the run was started with ``ckpt_path="last"``. Reset when that is checked.
    """

    asked = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that training starts anew, if it does.

        Raises:
            CheckpointError: there are checkpoints, and none of them can be the last one.
        """
        if not self._is_missing(trainer):
            return
        saving, other = _saving(trainer), _newest(trainer)
        unsaved = bool(saving) and not any(each.save_last for each in saving)
        if other is not None and unsaved:
            raise CheckpointError(
                f"`ckpt_path` is 'last', and there is no last checkpoint, because {type(saving[0]).__name__} saves "
                f"one only with `save_last: true`. Set that, and give {other} as `ckpt_path` to resume from it."
            )
        told = "There is no last checkpoint yet, so training starts anew, at step 1."
        if other is not None:
            told += f" To resume from {other}, give that file as `ckpt_path`."
        if unsaved:
            told += f" This run saves none either: set `save_last: true` in its {type(saving[0]).__name__}."
        rank_zero_info(told)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to evaluate an untrained model.

        Raises:
            CheckpointError: there is no checkpoint.
        """
        if trainer.state.fn != "fit" and self._is_missing(trainer):
            other = _newest(trainer)
            hint = "" if other is None else f" {other} is there. A last one is saved with `save_last: true`."
            raise CheckpointError(
                "`ckpt_path` is 'last', and there is no last checkpoint, so the model would be an untrained one. Give "
                "the checkpoint's file, or `default_root_dir`, logger and checkpoint callback of the run that saved "
                f"it.{hint}"
            )

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def _is_missing(self, trainer: Trainer) -> bool:
        asked, self.asked = self.asked, False
        return asked and trainer.ckpt_path is None


def also_of_earlier_runs(callback: ModelCheckpoint) -> None:
    """Let ``ckpt_path="last"`` find what a callback of Lightning's saved in earlier runs.

    ``RolloutCheckpoint`` does so by itself. Lightning has no hook for it, so the method of this object is replaced.
    """
    setattr(callback, "_find_last_checkpoints", partial(_last_ones, callback))  # noqa: B010


def of_earlier_runs(callback: ModelCheckpoint, trainer: Trainer, found: set[str]) -> set[str]:
    """Candidates for the last checkpoint: those of this run's directory, else of the logger's earlier runs.

    Args:
        callback: one that was not set up yet. What saves into a given directory has no earlier runs.
        trainer: has the logger.
        found: the candidates in this run's directory.
    """
    if found or callback.dirpath is not None:
        return found
    return set(map(str, _in_earlier_runs(trainer, f"checkpoints/{callback.CHECKPOINT_NAME_LAST}*.ckpt")))


def _last_ones(callback: ModelCheckpoint, trainer: Trainer) -> set[str]:
    return of_earlier_runs(callback, trainer, type(callback)._find_last_checkpoints(callback, trainer))


def _in_earlier_runs(trainer: Trainer, pattern: str) -> list[Path]:
    """Files of the logger's runs. There are none without a logger, or where a user has named the run."""
    if not trainer.loggers or has_named_version(trainer.loggers[0]):
        return []
    kind = "version_*" if isinstance(trainer.loggers[0], CSVLogger | TensorBoardLogger) else "*"
    return list(_runs(trainer).glob(f"{kind}/{pattern}"))


def _runs(trainer: Trainer) -> Path:
    logger = trainer.loggers[0]
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)


def _saving(trainer: Trainer) -> list[ModelCheckpoint]:
    return [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]


def _newest(trainer: Trainer) -> Path | None:
    """The newest checkpoint, of whatever name, where the callbacks that are set up save or have saved."""
    found: list[Path] = []
    for directory in {Path(each.dirpath) for each in _saving(trainer) if each.dirpath is not None}:
        found += directory.glob("**/*.ckpt")
        if trainer.loggers and directory.parent.parent == _runs(trainer):
            found += _in_earlier_runs(trainer, "checkpoints/**/*.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
