"""Precisions and plugins that train nothing, or another policy than the settings say, are refused before a rollout."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, Precision, TransformerEnginePrecision
from small import Digits, Rows, fit, module, trainer

from lightning_lambdapo import AdapterConfig, LambdaPOModule, PolicyConfig, RolloutConfig
from lightning_lambdapo.checks import check_trainable
from lightning_lambdapo.rollout.sampler import RolloutSampler


@pytest.fixture(autouse=True)
def _no_rollout(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "evaluat" not in request.node.name:
        monkeypatch.setattr(RolloutSampler, "complete", lambda *_, **__: pytest.fail("a rollout was paid for"))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_full_fine_tuning_under_16_bit_precision_is_refused(base: str, tmp_path: Path, precision: str) -> None:
    """Before weights are loaded."""
    model = module(base)
    with pytest.raises(ValueError, match=rf"{precision}.* all trained weights in 16 bits.*bf16-mixed.*dtype: float32`"):
        fit(tmp_path, model, precision=precision)
    assert not hasattr(model, "policy")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_full_fine_tuning_of_16_bit_weights_is_refused(base: str, tmp_path: Path, dtype: Any, precision: str) -> None:
    message = rf"21 of 21 trained tensors are stored in 16 bits .*torch\.{dtype}.*`policy.dtype: float32`.*bf16-mixed"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module(base, policy=PolicyConfig(base, dtype=dtype)), precision=precision)


def test_a_single_trained_tensor_of_16_bits_is_enough(base: str, tmp_path: Path) -> None:
    """Whoever makes the policy: here a subclass, of which only one layer is trained."""

    class Own(LambdaPOModule):
        def build_policy(self) -> Any:
            policy = tiny.model().requires_grad_(False)
            policy.lm_head.to(torch.bfloat16).requires_grad_()
            return policy

    with pytest.raises(ValueError, match=r"1 of 1 trained tensors .*\(lm_head.weight is torch.bfloat16\)"):
        fit(tmp_path, Own(PolicyConfig(base), rewards=[Digits()]))


def test_wide_weights_and_frozen_narrow_ones_are_fine() -> None:
    for dtype in (torch.float32, torch.float64):
        check_trainable(tiny.model(dtype=dtype))
    check_trainable(tiny.adapted(dtype=torch.bfloat16))


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"precision": "bf16-true"}])
def test_weights_of_16_bits_can_be_evaluated(base: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    policy = PolicyConfig(base, dtype=settings.pop("dtype", "float32"))
    model = module(base, policy=policy, rollout=RolloutConfig(engine="hf", max_new_tokens=2))
    run = trainer(tmp_path, limit_val_batches=1, **settings)
    assert "val/reward" in run.validate(model, Rows(batch_size=4), verbose=False)[0]


@pytest.mark.parametrize("lora", [None, AdapterConfig(r=4)])
@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (BitsandbytesPrecision, r"BitsandbytesPrecision replaces every linear layer .*set `policy\.quantization`"),
        (TransformerEnginePrecision, r'TransformerEnginePrecision replaces every .*precision="bf16-mixed"'),
    ],
)
def test_plugins_that_replace_layers_are_refused(
    base: str, tmp_path: Path, lora: Any, plugin: type[Precision], message: str
) -> None:
    """Lightning accepts them on a GPU alone, and the second needs a package, so neither is made in the usual way."""
    run = trainer(tmp_path, limit_val_batches=1)
    run.strategy.precision_plugin = object.__new__(plugin)
    model = module(base, lora=lora)
    for start in (run.fit, run.validate):
        with pytest.raises(ValueError, match=message):
            start(model, Rows(batch_size=4))
    assert not hasattr(model, "policy")
