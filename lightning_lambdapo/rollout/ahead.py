"""Sampling of the next rollout while the policy learns from this one, for engines that are elsewhere."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from lightning_lambdapo.datatypes import PromptBatch, Rollout


class Early(NamedTuple):
    """A rollout that was sampled before its step: its prompts, and the version of the weights that it comes from."""

    batch: PromptBatch
    rollout: Rollout
    version: int


class SampledAhead:
    """At most one rollout that is being sampled in a thread of its own."""

    def __init__(self) -> None:
        self._pending: Future[Early] | None = None

    def start(self, batch: PromptBatch, version: int, generate: Callable[[], Rollout]) -> None:
        """Begin to sample the completions of ``batch``."""
        pending: Future[Early] = Future()

        def work() -> None:
            try:
                pending.set_result(Early(batch, generate(), version))
            except BaseException as error:
                pending.set_exception(error)

        self._pending = pending
        threading.Thread(target=work, name="rollout", daemon=True).start()  # the process does not wait for it

    def finished(self) -> Early | None:
        """Wait for the rollout that was begun. It stays here. None if there is none."""
        return None if self._pending is None else self._pending.result()

    def drop(self) -> None:
        """Forget a rollout that nobody will take."""
        self._pending = None

    def take(self, batch: PromptBatch) -> Rollout | None:
        """The rollout of ``batch``. None if it was not begun, as in a run's or an epoch's first step."""
        early, self._pending = self.finished(), None
        if early is None or early.batch.prompt_ids.tolist() != batch.prompt_ids.tolist():
            return None
        return early.rollout


def following_batch(trainer: Any) -> PromptBatch | None:
    """The batch of the next training step. None at the end of an epoch or of training.

    Raises:
        ValueError: the training data does not tell what follows.
    """
    loader = trainer.train_dataloader
    if not hasattr(loader, "following"):
        raise ValueError(
            "`rollout.servers.max_staleness` is 1, and the training data does not tell the next batch beforehand. Use "
            "`LambdaPODataModule`, or set max_staleness to 0."
        )
    updates = trainer.lightning_module.updates_per_rollout
    is_last = trainer.max_steps != -1 and trainer.global_step + updates >= trainer.max_steps
    is_last |= trainer.fit_loop.batch_idx + 1 >= trainer.num_training_batches  # `limit_train_batches`
    following: PromptBatch | None = loader.following
    return None if is_last else following
