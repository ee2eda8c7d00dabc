"""The validation that a run was killed in, which Lightning does not make when the run is taken up."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from lightning.pytorch import Trainer


def is_owed(trainer: Trainer, *, so_far: bool) -> bool:
    """Whether a checkpoint that is saved now lies between a training step and the end of the validation after it.

    Args:
        trainer: with which it is saved.
        so_far: what the checkpoint that the run was taken up from says; it holds until training has begun.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.enable_validation:
        return False
    if trainer.validating:
        batch: Any = loop.val_loop.batch_progress.current
        return not (loop.val_loop.batch_progress.is_last_batch and batch.completed == batch.processed)
    timed = getattr(trainer, "_val_check_time_interval", None) is not None
    if trainer.fit_loop._data_fetcher is None or (getattr(trainer, "val_check_batch", None) is None and not timed):
        return so_far
    step: Any = loop.batch_progress.current
    in_train_batch_end = step.processed == step.ready and step.completed == step.processed - 1
    if not in_train_batch_end or not loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher)):
        return False
    return _has_data(trainer)


def make(trainer: Trainer) -> None:
    """Run validation inside ``fit``, from its first batch on, before training goes on; none where there are no data."""
    if not trainer.enable_validation or not _has_data(trainer):
        return
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    loop.val_loop.restarting = False
    loop.val_loop.reset_restart_stage()
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    with _epoch_open(trainer):
        loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter
    loop.val_loop._has_run = False  # to Lightning it has not; the epoch would seem to be over


def _has_data(trainer: Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    return sum(loop._max_batches) > 0


@contextmanager
def _epoch_open(trainer: Trainer) -> Iterator[None]:
    """Undo, for a while, that Lightning has closed the epoch whose last step the run is taken up after."""
    fit_loop = trainer.fit_loop
    closed = fit_loop.epoch_loop.restarted_on_train_batch_end and fit_loop.restarted_mid_epoch
    parts: list[Any] = []
    if closed and fit_loop.epoch_loop.batch_progress.is_last_batch:
        parts = [fit_loop.epoch_progress.current, fit_loop.epoch_progress.total]
    for part in parts:
        part.processed -= 1
        part.completed -= 1
    try:
        yield
    finally:
        for part in parts:
            part.processed += 1
            part.completed += 1
