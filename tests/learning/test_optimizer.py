"""Gradient scaling changes nothing: the norm, the clipping and the update are those of the unscaled gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from small import Recorder, Rows, equal, module, trainer, weights
from torch import Tensor

Optimizers = dict[str, Callable[[Any], torch.optim.Optimizer]]

#: The fused ones unscale in their own step, so Lightning does not.
OPTIMIZERS: Optimizers = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=False),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=1.0, fused=True),
}


class ScaledFloat32(MixedPrecision):
    """``16-mixed`` of which only the gradient scaling is left, so that a run is that of float32 to the bit."""

    def __init__(self, scale: float) -> None:
        super().__init__("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        self.precision = "32-true"  # so nothing corrects for rounded products

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


def run(base: str, path: Path, name: str, plugin: MixedPrecision | None) -> tuple[Any, list[dict[str, float]]]:
    """The trained module, and what its four steps logged."""
    model, recorder = module(base, optimizer=OPTIMIZERS[name], max_grad_norm=0.05), Recorder()
    settings = {} if plugin is None else {"plugins": plugin}
    run = trainer(path, callbacks=[recorder], enable_checkpointing=True, **settings)
    run.fit(model, Rows(batch_size=4))
    return model, recorder.steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_run_is_the_run_without_a_scaler(base: str, tmp_path: Path, name: str) -> None:
    """A power of two scales float32 without rounding, so all weights and norms are equal to the bit."""
    plain, expected = run(base, tmp_path, name, None)
    scaled, found = run(base, tmp_path, name, ScaledFloat32(1024.0))
    assert all(step["train/grad_norm"] > 0.05 for step in expected), "every update is clipped"
    assert [step["train/grad_norm"] for step in found] == [step["train/grad_norm"] for step in expected]
    assert equal(weights(scaled), weights(plain))


@pytest.mark.parametrize("overflows", [2, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_skips_the_update_and_lowers_the_scale(
    base: str, tmp_path: Path, name: str, overflows: int
) -> None:
    """Normal while a scaler adapts: nothing moves, the scale is halved, and no update counts as skipped."""
    plugin = ScaledFloat32(1024.0)
    model = module(base, optimizer=OPTIMIZERS[name])
    model.configure_model()
    before = weights(model)
    next(model.policy.parameters()).register_hook(
        lambda gradient: gradient + (torch.inf if model.rollout_step < overflows else 0.0)
    )
    trainer(tmp_path, plugins=plugin).fit(model, Rows(batch_size=4))
    assert plugin.scaler is not None
    assert model.rollout_step == 4
    assert plugin.scaler.get_scale() == 1024.0 / 2**overflows
    assert equal(weights(model), before) == (overflows == 4)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    assert model.run_state.skipped_updates == 0


def test_float16_autocast_clips_to_the_norm(base: str, tmp_path: Path) -> None:
    """The real plugin: fused SGD at rate 1 moves by exactly the clipped gradient, whatever the scale."""
    for scale in (1.0, 512.0):
        model = module(base, optimizer=OPTIMIZERS["fused SGD"], max_grad_norm=1e-3)
        model.configure_model()
        before, recorder = weights(model), Recorder()
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        trainer(tmp_path, plugins=plugin, callbacks=[recorder], enable_checkpointing=True, limit_train_batches=1).fit(
            model, Rows(batch_size=4)
        )
        moved: Tensor = torch.cat([(value - before[name]).flatten() for name, value in weights(model).items()])
        assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
        assert 1e-2 < recorder.steps[0]["train/grad_norm"] < 10
