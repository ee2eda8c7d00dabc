"""Every use of Lightning's private parts, with its reason. All were checked against Lightning 2.6.6.

Lightning has no public way to do these. The tests named below fail if a release changes one of them.

Two classes inherit from Lightning's and use private methods of their parents:

- ``RolloutCheckpoint`` saves when rollouts are counted, which no setting of the parent does. It calls
  ``_should_skip_saving_checkpoint``, ``_save_topk_checkpoint`` and ``_save_last_checkpoint``. It overrides
  ``_monitor_candidates``, because ``step`` in a file's name counts rollouts, and ``_find_last_checkpoints``, because
  the last checkpoint may lie in the directory of the logger's earlier run (callbacks/test_checkpoint).
- ``LambdaPOCLI`` reads settings with ``_get``. It overrides ``_prepare_subcommand_kwargs``, because earlier files must
  be kept before a run starts, ``_parse_ckpt_path``, because a checkpoint's settings must not override the command line,
  and ``_run_subcommand``, because a rehearsal runs nothing (commands/test_main).

For the same reason ``callbacks/last_checkpoint`` replaces ``_find_last_checkpoints`` of Lightning's own
``ModelCheckpoint`` objects under the command line (commands/test_run_files).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import Strategy

from lightning_lambdapo.functional.ranges import path_text

# -- the module --------------------------------------------------------------------------------------------------------


def built_by_cli() -> bool:
    """True while LightningCLI builds the module: it has the parsed hyper-parameters (checkpointing/test_state)."""
    return _given_hyperparameters.get() is not None


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The module's trainer, or None. The public property raises an error instead (checkpointing/test_state)."""
    return module._trainer


# -- strategies --------------------------------------------------------------------------------------------------------


def writes_shards(strategy: Strategy) -> bool:
    """Whether the strategy writes checkpoints in shards. No public property says so (distributed/test_scale)."""
    distributed = getattr(strategy, "_save_distributed_checkpoint", False)  # ModelParallelStrategy
    return bool(distributed) or getattr(strategy, "_state_dict_type", None) == "sharded"  # FSDPStrategy


# -- paths -------------------------------------------------------------------------------------------------------------


def expand_home(trainer: Trainer) -> None:
    """Read ``~`` in the loggers' directories as the home directory. Lightning does so for some files (test_paths)."""
    for logger in trainer.loggers:
        for name in ("_root_dir", "_save_dir"):
            value = getattr(logger, name, None)
            if isinstance(value, str):
                setattr(logger, name, path_text(value))


# -- signals -----------------------------------------------------------------------------------------------------------


def sigterm_handler(trainer: Trainer) -> Callable[..., Any] | None:
    """Lightning's handler of SIGTERM, to find it among the installed ones (checkpointing/test_resume)."""
    connector = getattr(trainer, "_signal_connector", None)
    return getattr(connector, "_sigterm_notifier_fn", None)


def started_by_lightning() -> bool:
    """True in a rank that Lightning's first rank has started.

    That one kills all processes once another ends with an error, and its exit code counts (commands/test_run_files).
    """
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


# -- what was logged ---------------------------------------------------------------------------------------------------


def logged_names(trainer: Trainer) -> set[str]:
    """Names that the running loop has logged. Public mappings also have earlier ones (callbacks/test_checkpoint)."""
    return {each.meta.name for each in (trainer._results or {}).values()}


def forget_logged(trainer: Trainer, name: str) -> None:
    """Drop the last value of a name that a training step logged: Lightning would log it again (test_training_step)."""
    if trainer._results is not None:
        trainer._results.pop(f"training_step.{name}", None)
    for metrics in (trainer.callback_metrics, trainer.logged_metrics):
        metrics.pop(name, None)


# -- validation inside of fit (checkpointing/test_resume) --------------------------------------------------------------


def training_has_begun(trainer: Trainer) -> bool:
    """Whether ``fit`` has set up its data, and with it the schedule of validation."""
    timed = getattr(trainer, "_val_check_time_interval", None) is not None
    return trainer.fit_loop._data_fetcher is not None and (
        getattr(trainer, "val_check_batch", None) is not None or timed
    )


def validation_is_next(trainer: Trainer) -> bool:
    """Whether a validation follows the training step that is just ending."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher)))


def has_validation_data(trainer: Trainer) -> bool:
    """Whether there is a batch to validate with. Sets up the data."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    return sum(loop._max_batches) > 0


def validate_inside_fit(trainer: Trainer) -> None:
    """Run a whole validation before training continues, and restore the state of the loops.

    A public ``Trainer.validate`` inside of ``fit`` would end the fit.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    loop.val_loop.restarting = False
    loop.val_loop.reset_restart_stage()
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    with _epoch_open(trainer):
        loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter
    loop.val_loop._has_run = False  # otherwise the epoch would seem to be over


def begin_next_epoch(trainer: Trainer) -> None:
    """Count the next epoch if a run resumes after the last step of one. Call before the first step.

    Lightning would not count it, nor call ``on_train_epoch_start``. A checkpoint from that epoch would then look like
    one from between epochs, and a run that resumes from it would train one epoch too many (checkpointing/test_resume).
    """
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    last = epoch_loop.restarted_on_train_batch_end and epoch_loop.batch_progress.is_last_batch
    if last and fit_loop.restarted_mid_epoch:
        fit_loop.reset_restart_stage()


def mend_epochs(checkpoint: Mapping[str, Any]) -> None:
    """Count the epoch that a checkpoint is from, if a run without :func:`begin_next_epoch` saved it in a step.

    Args:
        checkpoint: Lightning's entries, whose progress is changed.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs, batches = loops.get("epoch_progress"), loops.get("epoch_loop.batch_progress")
    if not epochs or not batches:
        return
    inside_step = batches["current"]["completed"] < batches["current"]["ready"]
    if inside_step and len(set(epochs["total"].values())) == 1:
        for part in (epochs["total"], epochs["current"]):
            part["ready"] += 1
            part["started"] += 1


@contextmanager
def _epoch_open(trainer: Trainer) -> Iterator[None]:
    """Reopen an epoch inside this context: Lightning closes it if a run resumes after its last step."""
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
