"""How far each update moves the trained parameters."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_lambdapo.datatypes import PromptBatch
from lightning_lambdapo.distributed.parallel import gather_objects, is_sharded
from lightning_lambdapo.policy.versions import trained_tensors


class UpdateNorm(Callback):
    r"""Logs ``train/update_norm``: the Euclidean norm of the change of all trained parameters.

    .. math:: \lVert \theta_{k+1} - \theta_k \rVert_2

    It is the mean over the updates of a step, and 0 for one without gradient. The change is what the optimizer did,
    after clipping, weight decay and the learning rate. So it tells how far two runs went, where their gradients' norms
    do not: Adam moves parameters equally far for gradients of any size. It costs a copy of the trained parameters.
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._squares: list[float] = []
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizer."""

        def before(*_: Any) -> None:
            self._before = {name: tensor.clone() for name, tensor in trained_tensors(pl_module).items()}

        def after(*_: Any) -> None:
            now = trained_tensors(pl_module)
            moved = [(now[name] - old).double().square().sum() for name, old in self._before.items()]
            self._squares.append(float(torch.stack(moved).sum()))
            self._before = {}

        for optimizer in trainer.optimizers:
            self._hooks += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Log the step's mean."""
        squares, self._squares = self._squares, []
        if is_sharded(trainer.strategy):  # each rank has seen its part
            squares = [sum(parts) for parts in zip(*gather_objects(squares), strict=True)]
        if squares:  # none if a gradient scale was too large
            pl_module.log("train/update_norm", sum(map(math.sqrt, squares)) / len(squares))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizer alone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._squares.clear()
