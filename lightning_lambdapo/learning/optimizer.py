"""Manual optimisation: clipping, skipping of non-finite updates, the schedule, and counters."""

import math
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_lambdapo.checkpointing.state import RunState
from lightning_lambdapo.distributed.parallel import clip_gradients, without_grad_scaler
from lightning_lambdapo.distributed.tally import Tally


class _OptimizedModule(Protocol):
    """What the optimizer reads of its module. It reads it at every update, because users may change any of it."""

    max_grad_norm: float | None
    max_skipped_updates: int
    run_state: RunState

    @property
    def trainer(self) -> Trainer: ...
    def optimizers(self) -> Any: ...
    def lr_schedulers(self) -> Any: ...
    def manual_backward(self, loss: Tensor) -> None: ...


class PolicyOptimizer:
    """A module's optimizer and schedule, as Lightning wraps them.

    Args:
        module: has the optimizer, the limits and the counters. Its ``on_before_optimizer_step`` must call :meth:`clip`.
    """

    def __init__(self, module: _OptimizedModule) -> None:
        self.module = module
        self._grad_norm = 0.0
        self._overflow_scale = math.inf  # the gradient scale of the last update that was skipped

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
        self.module.run_state.updates_in_step += 1
        self._optimizer().step()
        if math.isfinite(self._grad_norm):
            tally.ratio("grad_norm", self._grad_norm, 1.0)

    def step_without_gradient(self, *, finite: bool) -> None:
        """Count an update that changes no parameter. One that is not ``finite`` counts as skipped."""
        if not finite:
            self._skip("were of a rollout whose log-probabilities are not finite")
        self.module.run_state.updates_in_step += 1
        with without_grad_scaler(self.strategy):
            self._optimizer().step()

    def step_schedule(self, tally: Tally) -> None:
        """End an update with one step of the schedule."""
        tally.maximum("skipped_updates", torch.tensor(self.module.run_state.skipped_updates))
        schedule = self.module.lr_schedulers()
        if schedule is not None:
            schedule.step()

    def clip(self, optimizer: Optimizer) -> None:
        """Clip the unscaled gradient, or drop it if it is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        scaler = getattr(self.strategy.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # A fused optimizer unscales in its step, so Lightning leaves that to it, which is too late for the norm.
            scaler.unscale_(optimizer)
        self._grad_norm = clip_gradients(parameters, self.module.max_grad_norm, self.strategy)
        if math.isfinite(self._grad_norm):
            self.module.run_state.skipped_in_a_row = 0
            self._overflow_scale = math.inf
            return
        optimizer.zero_grad()
        self._skip(f"had a gradient norm of {self._grad_norm}", adapting=scaler is not None and self._adapts(scaler))

    def _adapts(self, scaler: torch.amp.GradScaler) -> bool:
        """Whether a smaller gradient scale may mend an update that is not finite.

        A scaler starts with a scale that is too large, and halves it at each such update. A scale of 1 scales nothing,
        so the gradient itself is not finite then. The same is so where the scale has not fallen since the last one.
        """
        scale, last = float(scaler.get_scale()), self._overflow_scale
        self._overflow_scale = scale
        return 1 < scale < last

    def _optimizer(self) -> LightningOptimizer:
        return cast(LightningOptimizer, self.module.optimizers())

    def _skip(self, reason: str, *, adapting: bool = False) -> None:
        """Count a skipped update. Too many in a row are an error, without those by which a gradient scale adapts."""
        self.module.run_state.skipped_updates += 1
        if adapting:
            return
        self.module.run_state.skipped_in_a_row += 1
        if self.module.run_state.skipped_in_a_row > self.module.max_skipped_updates:
            raise RuntimeError(
                f"{self.module.run_state.skipped_in_a_row} updates in a row {reason}. The policy has diverged or its "
                "precision is too low. Lower the learning rate, or use bf16-mixed or 32-true."
            )
