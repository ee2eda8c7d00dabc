"""The validation that a run was killed in. Lightning skips it when the run resumes, so it is repeated here."""

from typing import Any

from lightning.pytorch import Trainer

from lightning_lambdapo.distributed.lightning_internals import (
    begin_next_epoch,
    has_validation_data,
    training_has_begun,
    validate_inside_fit,
    validation_is_next,
)


def is_pending(trainer: Trainer, *, so_far: bool) -> bool:
    """Whether a checkpoint saved now is between a training step and the end of the validation that follows it.

    Args:
        trainer: the trainer that saves it.
        so_far: the answer for the checkpoint that the run resumed from. It is used until training has begun.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.enable_validation:
        return False
    if trainer.validating:
        batch: Any = loop.val_loop.batch_progress.current
        return not (loop.val_loop.batch_progress.is_last_batch and batch.completed == batch.processed)
    if not training_has_begun(trainer):
        return so_far
    step: Any = loop.batch_progress.current
    in_train_batch_end = step.processed == step.ready and step.completed == step.processed - 1
    return in_train_batch_end and validation_is_next(trainer) and has_validation_data(trainer)


def complete_epoch(trainer: Trainer, run_state: Any) -> None:
    """Run a pending validation inside ``fit``, from its first batch, and let the next epoch begin as any other.

    Args:
        trainer: the trainer, in ``fit``, before its first step.
        run_state: says in ``pending_validation`` whether there is one, which is changed.
    """
    pending, run_state.pending_validation = run_state.pending_validation, False
    if pending and trainer.enable_validation and has_validation_data(trainer):
        validate_inside_fit(trainer)
    begin_next_epoch(trainer)
