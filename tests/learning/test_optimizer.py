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
from where import DEVICE

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
        super().__init__("16-mixed", device=DEVICE.type, scaler=torch.amp.GradScaler(DEVICE.type, init_scale=scale))
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
    """Normal while a scaler adapts: nothing moves, the scale is halved, and the update is counted."""
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
    assert model.run_state.skipped_updates == overflows
    assert model.run_state.skipped_in_a_row == 0


def broken(model: Any, bad: Callable[[int], bool], value: float = torch.nan) -> None:
    """Let the gradient of one parameter be ``value`` in the updates (from 0) that are ``bad``."""
    next(model.policy.parameters()).register_hook(
        lambda gradient: gradient + (value if bad(model.rollout_step) else 0.0)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_never_finite_are_an_error(base: str, tmp_path: Path, name: str, value: float) -> None:
    """A scale of 8 may be halved three times, down to 1. After that the same four updates end the run as elsewhere."""
    plugin = ScaledFloat32(8.0)
    model, recorder = module(base, optimizer=OPTIMIZERS[name]), Recorder()
    model.configure_model()
    before = weights(model)
    broken(model, lambda _: True, value)
    message = (
        rf"4 updates in a row had a gradient norm of {value}\. The policy has diverged or its precision is too low"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer(tmp_path, plugins=plugin, callbacks=[recorder], enable_checkpointing=True, max_epochs=9).fit(
            model, Rows(batch_size=4)
        )
    assert [step["train/skipped_updates"] for step in recorder.steps] == [1, 2, 3, 4, 5, 6]
    assert model.run_state.skipped_updates == 7
    assert equal(weights(model), before)


def test_float16_itself_ends_at_gradients_that_are_never_finite(base: str, tmp_path: Path) -> None:
    """The real plugin with its own scale of 65536: 16 halvings, then four more."""
    plugin = MixedPrecision("16-mixed", device=DEVICE.type, scaler=torch.amp.GradScaler(DEVICE.type))
    model = module(base)
    model.configure_model()
    broken(model, lambda _: True)
    with pytest.raises(RuntimeError, match="4 updates in a row had a gradient norm of nan"):
        trainer(tmp_path, plugins=plugin, max_epochs=20).fit(model, Rows(batch_size=4))
    assert model.run_state.skipped_updates == 20


def test_overflows_between_good_updates_are_no_error(base: str, tmp_path: Path) -> None:
    plugin = ScaledFloat32(1.0)
    model, recorder = module(base), Recorder()
    model.configure_model()
    broken(model, lambda step: step % 4 != 0)
    trainer(tmp_path, plugins=plugin, callbacks=[recorder], enable_checkpointing=True, max_epochs=3).fit(
        model, Rows(batch_size=4)
    )
    assert model.rollout_step == 12
    assert model.run_state.skipped_updates == 9


def test_a_norm_that_overflows_alone_is_an_error(base: str, tmp_path: Path) -> None:
    """The gradient is finite and its norm is not, so the scaler sees nothing and would never lower its scale."""
    plugin = ScaledFloat32(1024.0)
    model = module(base)
    model.configure_model()
    next(model.policy.parameters()).register_hook(lambda gradient: torch.full_like(gradient, 1e35))
    with pytest.raises(RuntimeError, match="4 updates in a row had a gradient norm of inf"):
        trainer(tmp_path, plugins=plugin, max_epochs=3).fit(model, Rows(batch_size=4))
    assert model.run_state.skipped_updates == 5, "the first might have been the scale's"


def test_float16_autocast_clips_to_the_norm(base: str, tmp_path: Path) -> None:
    """The real plugin: fused SGD at rate 1 moves by exactly the clipped gradient, whatever the scale."""
    for scale in (1.0, 512.0):
        model = module(base, optimizer=OPTIMIZERS["fused SGD"], max_grad_norm=1e-3)
        model.configure_model()
        before, recorder = weights(model), Recorder()
        plugin = MixedPrecision(
            "16-mixed", device=DEVICE.type, scaler=torch.amp.GradScaler(DEVICE.type, init_scale=scale)
        )
        trainer(tmp_path, plugins=plugin, callbacks=[recorder], enable_checkpointing=True, limit_train_batches=1).fit(
            model, Rows(batch_size=4)
        )
        moved: Tensor = torch.cat([(value - before[name]).flatten() for name, value in weights(model).items()])
        assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
        assert 1e-2 < recorder.steps[0]["train/grad_norm"] < 10
