"""Checkpoints that count rollouts."""

import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_lambdapo.callbacks.last_checkpoint import LastCheckpoint, of_earlier_runs
from lightning_lambdapo.callbacks.run import finished_rollouts
from lightning_lambdapo.datatypes import PromptBatch
from lightning_lambdapo.distributed.lightning_internals import logged_names
from lightning_lambdapo.functional.ranges import check_whole


class RolloutCheckpoint(ModelCheckpoint, LastCheckpoint):
    """``ModelCheckpoint`` that counts rollouts.

    Under manual optimisation Lightning's own counts optimizer updates, warns at each save and ignores
    ``train_time_interval``. In ``filename``, ``{step}`` is the number of finished rollouts.

    ``ckpt_path="last"`` also finds the last checkpoint of the logger's earlier runs, so the same command line resumes
    an interrupted run. A run whose version the user has named finds only its own. Where there is no checkpoint, ``fit``
    starts anew and says so, and ``validate``, ``test`` and ``predict`` are errors.

    With several ranks ``save_on_exception`` saves only on SIGTERM, because all ranks stop at it together. Saving needs
    all ranks, and another exception may occur on one rank alone. With a ``monitor`` that validation logs, the best
    checkpoints are chosen and saved when a validation ends. The last one is saved when it is due. All other settings
    work as in the parent class.

    Args:
        every_n_rollouts: save every this many training steps.
        train_time_interval: save whenever this much time has passed since the last save.
        filename: name of the files, with ``{step}`` and logged names as placeholders.
        save_last: also keep the newest checkpoint as ``last.ckpt``, a copy or with ``"link"`` a symbolic link.
        dirpath: directory of the files. None uses ``checkpoints`` in the run's directory.
        monitor: logged value by which the best are chosen. None keeps the newest.
        mode: ``"min"`` if a smaller ``monitor`` is better, ``"max"`` if a larger one is.
        save_top_k: number of the best to keep. -1 keeps all, 0 none but the last.
        save_on_exception: save when training stops at an exception.
        save_weights_only: omit what resuming needs.
        verbose: print each save.
        auto_insert_metric_name: write ``name=value`` for placeholders of ``filename``, not the value alone.
        save_on_train_epoch_end: as for ``ModelCheckpoint``.
        enable_version_counter: add a version to a file's name if it exists already.
    """

    asked = False

    # Every setting of the parent is named, because a configuration can only set what is in the signature.
    def __init__(
        self,
        every_n_rollouts: int | None = None,
        train_time_interval: timedelta | None = None,
        filename: str | None = "rollout-{step}",
        save_last: bool | Literal["link"] | None = True,
        dirpath: str | Path | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        verbose: bool = False,
        auto_insert_metric_name: bool = True,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        if (every_n_rollouts is None) == (train_time_interval is None):
            raise ValueError("Give exactly one of `every_n_rollouts` and `train_time_interval`.")
        if every_n_rollouts is not None:
            check_whole("every_n_rollouts", every_n_rollouts, 1)
        if train_time_interval is not None and train_time_interval < timedelta():
            raise ValueError(f"`train_time_interval` must not be negative, got {train_time_interval}.")
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last,
            save_top_k=save_top_k,
            save_on_exception=save_on_exception,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_epochs=0,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
        )
        self.every_n_rollouts = every_n_rollouts
        self.interval = train_time_interval
        self._saved_at = time.monotonic()
        self._awaits_value = False
        self._trained: set[str] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Save when a rollout count or an interval is reached."""
        if self.every_n_rollouts is not None:
            due = finished_rollouts(trainer) % self.every_n_rollouts == 0
        else:
            passed = time.monotonic() - self._saved_at >= (self.interval or timedelta()).total_seconds()
            due = bool(trainer.strategy.broadcast(passed))  # clocks differ between ranks, and saving is a collective
        self._trained |= logged_names(trainer)
        if due and not self._should_skip_saving_checkpoint(trainer):
            candidates: dict[str, Tensor] = self._monitor_candidates(trainer)
            self._awaits_value = self.monitor is not None and self.monitor not in self._trained
            if self.monitor is None or (not self._awaits_value and self.monitor in candidates):
                self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
            self._saved_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the weights that this validation's ``monitor`` belongs to, if a save was due since the last one.

        Raises:
            MisconfigurationException: the validation did not log ``monitor``.
        """
        super().on_validation_end(trainer, pl_module)
        if self._awaits_value and trainer.state.fn == "fit" and not trainer.sanity_checking:
            candidates: dict[str, Tensor] = self._monitor_candidates(trainer)
            if self.monitor in candidates or str(self.monitor).startswith("val/"):
                if self.monitor not in candidates and self.save_top_k != 0:
                    raise MisconfigurationException(self._nothing_to_choose_by(trainer, "validation does not log it"))
                self._awaits_value = False
                self._save_topk_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last checkpoint if that is not done, and warn if no best one could be chosen."""
        super().on_train_end(trainer, pl_module)
        if self.monitor is not None and not self.best_model_path and trainer.is_global_zero:
            warnings.warn(self._nothing_to_choose_by(trainer, "it was not logged when a save was due"), stacklevel=2)

    def _nothing_to_choose_by(self, trainer: Trainer, reason: str) -> str:
        return (
            f"RolloutCheckpoint(monitor={self.monitor!r}) saved no best checkpoint, because {reason}. Logged are "
            f"{', '.join(sorted(trainer.callback_metrics))}."
        )

    def state_dict(self) -> dict[str, Any]:
        """The parent's state, and whether a save waits for the next validation."""
        return {**super().state_dict(), "awaits_score": self._awaits_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        with warnings.catch_warnings():
            if self.monitor is None:  # there are no monitored values to lose
                warnings.filterwarnings("ignore", message="The dirpath has changed")
            super().load_state_dict(state_dict)
        self._awaits_value = state_dict.get("awaits_score", False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if all ranks can."""
        if trainer.world_size == 1 or isinstance(exception, SIGTERMException):
            super().on_exception(trainer, pl_module, exception)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """The logged values, with rollouts in place of updates as ``step``."""
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(finished_rollouts(trainer))}

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Candidates for ``ckpt_path="last"``: of this run's directory, else of the logger's earlier runs."""
        self.asked = True
        return of_earlier_runs(self, trainer, super()._find_last_checkpoints(trainer))
