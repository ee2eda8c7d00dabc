"""The validation that a run was killed in, which Lightning does not make when the run is taken up."""

from typing import Any, cast

from lightning.pytorch import Trainer


def is_owed(trainer: Trainer) -> bool:
    """Whether a checkpoint that is saved now lies between a training step and the end of the validation after it."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.enable_validation:
        return False
    if trainer.validating:
        batch: Any = loop.val_loop.batch_progress.current
        return not (loop.val_loop.batch_progress.is_last_batch and batch.completed == batch.processed)
    step: Any = loop.batch_progress.current
    in_train_batch_end = step.processed == step.ready and step.completed == step.processed - 1
    return in_train_batch_end and loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher))


def make(trainer: Trainer) -> None:
    """Run validation inside ``fit``, from its first batch on, before training goes on."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    loop.val_loop.restarting = False
    loop.val_loop.reset_restart_stage()
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter
