"""One optimizer update: gradient, clipping, the checks that may drop it, and what is counted of it."""

import math
from typing import cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lightning_lambdapo import parallel
from lightning_lambdapo.learning import Learner, Update
from lightning_lambdapo.tally import Tally


class PolicyUpdates(LightningModule):
    """The manual optimisation of a module that has a ``learner``.

    Attributes:
        skipped_updates: updates that were dropped because something was not finite.
        skipped_in_a_row: of these, the ones since the last update that was made.
        updates_in_step: updates of the present training step that have begun.
    """

    learner: Learner
    max_grad_norm: float | None
    max_skipped_updates: int

    def __init__(self) -> None:
        super().__init__()
        self.skipped_updates = 0
        self.skipped_in_a_row = 0
        self.updates_in_step = 0
        self._grad_norm = 0.0

    def learn(self, update: Update, advantages: Tensor, old_logprobs: Tensor | None, tally: Tally) -> None:
        """Make one optimizer update of one mini-batch; without a row to learn from no parameter moves."""
        optimizer, strategy = cast(LightningOptimizer, self.optimizers()), self.trainer.strategy
        optimizer.zero_grad()
        tally.ratio("lr", optimizer.param_groups[0]["lr"], 1.0)
        tally.ratio("empty_updates", float(not update.learns), 1.0)
        if update.learns and update.finite:
            self.learner.accumulate(
                update, advantages, old_logprobs, strategy=strategy, backward=self.manual_backward, tally=tally
            )
            self.updates_in_step += 1
            optimizer.step()
            if math.isfinite(self._grad_norm):
                tally.ratio("grad_norm", self._grad_norm, 1.0)
        else:
            if not update.finite:
                self._skip("were of a rollout whose log-probabilities are not finite")
            self.updates_in_step += 1
            with parallel.without_grad_scaler(strategy):
                optimizer.step()
        tally.maximum("skipped_updates", torch.tensor(self.skipped_updates))
        tally.maximum("memory_retries", torch.tensor(self.learner.memory_retries))
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient (unscaled by now), or drop it where it is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        self._grad_norm = parallel.clip_gradients(parameters, self.max_grad_norm, self.trainer.strategy)
        if math.isfinite(self._grad_norm):
            self.skipped_in_a_row = 0
            return
        optimizer.zero_grad()
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a scaler looks for its scale this way
            self._skip(f"had a gradient norm of {self._grad_norm}")

    def _skip(self, reason: str) -> None:
        """Count an update that is not made; too many in a row are an error."""
        self.skipped_updates += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skipped_updates:
            raise RuntimeError(
                f"{self.skipped_in_a_row} updates in a row {reason}; the policy has diverged or its precision does not "
                "hold. Lower the learning rate, or use bf16-mixed or 32-true."
            )
