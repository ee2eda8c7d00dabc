"""How far an update moved the parameters, after clipping and the learning rate."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small import Rows, Same, fit, module, trainer, weights

from lightning_lambdapo import AdapterConfig, UpdateNorm
from lightning_lambdapo.callbacks import update_norm


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Its change is the rate times the clipped gradient."""
    return torch.optim.SGD(parameters, lr=0.25)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("updates", [1, 2])
def test_under_sgd_it_is_the_rate_times_the_norm_of_the_gradient(
    base: str, tmp_path: Path, precision: Any, updates: int
) -> None:
    model = module(base, optimizer=sgd, max_grad_norm=None, updates_per_rollout=updates)
    steps = fit(tmp_path, model, callbacks=[UpdateNorm()], precision=precision)
    assert len(steps) == 4
    for step in steps:
        assert step["train/update_norm"] == pytest.approx(0.25 * step["train/grad_norm"], rel=1e-3)


def test_it_is_measured_after_clipping_and_of_what_is_trained(base: str, tmp_path: Path) -> None:
    model = module(base, optimizer=sgd, max_grad_norm=1e-3, lora=AdapterConfig(r=2))
    steps = fit(tmp_path, model, callbacks=[UpdateNorm()])
    assert all(step["train/update_norm"] == pytest.approx(0.25e-3, rel=1e-3) for step in steps)


def test_it_is_the_change_of_the_weights(base: str, tmp_path: Path) -> None:
    class Change(Callback):
        """The same from copies of all weights."""

        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.before = weights(pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            squares = [(new - self.before[name]).square().sum() for name, new in weights(pl_module).items()]
            self.found.append(math.sqrt(float(sum(squares))))

    change = Change()
    steps = fit(tmp_path, module(base), callbacks=[UpdateNorm(), change])
    assert [step["train/update_norm"] for step in steps] == pytest.approx(change.found, rel=1e-4)
    assert min(change.found) > 0


def test_it_is_zero_without_gradient_and_leaves_no_hooks(base: str, tmp_path: Path) -> None:
    callback = UpdateNorm()
    run = trainer(tmp_path, callbacks=[callback])
    run.fit(module(base, rewards=[Same()]), Rows(batch_size=4))
    assert run.callback_metrics["train/update_norm"] == 0
    assert not run.optimizers[0]._optimizer_step_pre_hooks
    assert not run.optimizers[0]._optimizer_step_post_hooks


def test_shards_are_summed(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, each with a part of the parameters: squares of 9 and 16 make 5."""
    monkeypatch.setattr(update_norm, "is_sharded", lambda _: True)
    monkeypatch.setattr(
        update_norm, "gather_objects", lambda squares: [[9.0 for _ in squares], [16.0 for _ in squares]]
    )
    steps = fit(tmp_path, module(base), callbacks=[UpdateNorm()])
    assert all(step["train/update_norm"] == 5.0 for step in steps)
