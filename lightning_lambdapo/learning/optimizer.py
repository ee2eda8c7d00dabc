"""Manual optimisation: clipping, skipping of non-finite updates, the schedule, and counters."""

import math
from typing import cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_lambdapo.checkpointing.state import RunState
from lightning_lambdapo.distributed.parallel import clip_gradients, without_grad_scaler
from lightning_lambdapo.distributed.tally import Tally


class PolicyOptimizer:
    """A module's optimizer and schedule, as Lightning wraps them.

    Args:
        module: has the optimizer. Its ``on_before_optimizer_step`` must call :meth:`clip`.
        state: receives the counts of updates.
        max_grad_norm: gradients are clipped to this global norm. None does not clip.
        max_skipped_updates: number of updates in a row that may be skipped.
    """

    def __init__(
        self, module: LightningModule, state: RunState, max_grad_norm: float | None, max_skipped_updates: int
    ) -> None:
        self.module = module
        self.state = state
        self.max_grad_norm = max_grad_norm
        self.max_skipped_updates = max_skipped_updates
        self._grad_norm = 0.0

    @property
    def strategy(self) -> Strategy:
        """The trainer's strategy."""
        return self.module.trainer.strategy

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""
        self.module.manual_backward(loss)

    def zero_grad(self, tally: Tally) -> None:
        """Begin an update."""
        optimizer = self._optimizer()
        optimizer.zero_grad()
        tally.ratio("lr", optimizer.param_groups[0]["lr"], 1.0)

    def step(self, tally: Tally) -> None:
        """Change the parameters by their gradient, unless it is not finite."""
        self.state.updates_in_step += 1
        self._optimizer().step()
        if math.isfinite(self._grad_norm):
            tally.ratio("grad_norm", self._grad_norm, 1.0)

    def step_without_gradient(self, *, finite: bool) -> None:
        """Count an update that changes no parameter. One that is not ``finite`` counts as skipped."""
        if not finite:
            self._skip("were of a rollout whose log-probabilities are not finite")
        self.state.updates_in_step += 1
        with without_grad_scaler(self.strategy):
            self._optimizer().step()

    def step_schedule(self, tally: Tally) -> None:
        """End an update with one step of the schedule."""
        tally.maximum("skipped_updates", torch.tensor(self.state.skipped_updates))
        schedule = self.module.lr_schedulers()
        if schedule is not None:
            schedule.step()  # type: ignore[union-attr]

    def clip(self, optimizer: Optimizer) -> None:
        """Clip the gradient (unscaled by now), or drop it if it is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        self._grad_norm = clip_gradients(parameters, self.max_grad_norm, self.strategy)
        if math.isfinite(self._grad_norm):
            self.state.skipped_in_a_row = 0
            return
        optimizer.zero_grad()
        if getattr(self.strategy.precision_plugin, "scaler", None) is None:  # normal while a scaler adapts
            self._skip(f"had a gradient norm of {self._grad_norm}")

    def _optimizer(self) -> LightningOptimizer:
        return cast(LightningOptimizer, self.module.optimizers())

    def _skip(self, reason: str) -> None:
        """Count a skipped update. Too many in a row are an error."""
        self.state.skipped_updates += 1
        self.state.skipped_in_a_row += 1
        if self.state.skipped_in_a_row > self.max_skipped_updates:
            raise RuntimeError(
                f"{self.state.skipped_in_a_row} updates in a row {reason}; the policy has diverged or its precision "
                "is too low. Lower the learning rate, or use bf16-mixed or 32-true."
            )
