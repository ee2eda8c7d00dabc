import copy
from typing import Any, cast

import pytest
import tiny
import torch
from gradients import IDS, logits_and_gradients
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from where import DEVICE

from lightning_lambdapo.policy.kernels import OneDNNLinear
from lightning_lambdapo.policy.lora import FusedLoraLinear, fast_linears


def fused_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls that take the one operation."""
    from lightning_lambdapo.policy import lora

    calls: list[int] = []
    apply = cast(Any, lora)._AdaptedLinear.apply

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return apply(*arguments)

    monkeypatch.setattr(lora._AdaptedLinear, "apply", counted)
    return calls


def test_fused_adapter_is_pefts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny.adapted(dtype=torch.float64).train()
    fused = copy.deepcopy(plain)
    fast_linears(fused, onednn=False)
    calls = fused_calls(fused, monkeypatch)
    expected, wanted = logits_and_gradients(plain)
    found, got = logits_and_gradients(fused)
    assert len(calls) == 14  # seven linear layers in each of two
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert got.keys() == wanted.keys()
    assert all("lora_" in name for name in got)
    for name, gradient in got.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_fused_adapter_in_16_bits(
    dtype: torch.dtype, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 adapter over 16-bit activations: as near to float64 as peft's own layer, and float32 gradients."""
    eps = torch.finfo(autocast or dtype).eps
    ratios = []
    for seed in range(6):
        settings = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
        plain = get_peft_model(tiny.model(seed=seed, dtype=dtype), settings).train()
        tiny.shake(plain, 0.3)
        exact = copy.deepcopy(plain).double()
        fused = copy.deepcopy(plain)
        fast_linears(fused, onednn=False)
        with monkeypatch.context() as patch:
            calls = fused_calls(fused, patch)
            logits, gradients = logits_and_gradients(exact)
            with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
                peft, ours = logits_and_gradients(plain), logits_and_gradients(fused)
        assert len(calls) == 14
        errors = []
        for found, all_found in (peft, ours):
            assert all_found.keys() == gradients.keys()
            assert all(gradient.dtype == torch.float32 for gradient in all_found.values())
            pairs = [(found, logits), *((all_found[name], gradients[name]) for name in gradients)]
            relative = [float((one.double() - other).norm() / other.norm()) for one, other in pairs]
            assert max(relative) < 30 * eps
            errors.append(sum(relative) / len(relative))
        ratios.append(errors[1] / errors[0])
    # Outside of autocast peft computes the adapter in float32.
    assert sum(ratios) / len(ratios) < (1.2 if autocast else 1.6)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_other_adapters_take_pefts_way(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny.adapted(dtype=torch.float32, **options).train()
    fused = copy.deepcopy(plain)
    fast_linears(fused, onednn=False)
    calls = fused_calls(fused, monkeypatch)
    torch.manual_seed(5)
    expected, wanted = logits_and_gradients(plain)
    torch.manual_seed(5)
    found, got = logits_and_gradients(fused)
    assert not calls
    torch.testing.assert_close(found, expected)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-3)


def test_switched_off_merged_and_doubled_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted(dtype=torch.float64)
    calls = fused_calls(model, monkeypatch)
    fast_linears(model, onednn=False)
    with_adapter = model(IDS).logits
    base = tiny.model("llama", dtype=torch.float64)(IDS).logits
    calls.clear()
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, base, rtol=0, atol=1e-12)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    for layer in model.modules():
        if isinstance(layer, FusedLoraLinear):
            layer.set_adapter(["default", "second"])
    torch.testing.assert_close(model(IDS).logits, with_adapter, rtol=0, atol=1e-12)  # the second one's B is 0
    assert not calls
    model.set_adapter("default")
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, with_adapter, rtol=0, atol=1e-8)
    assert not calls
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        model.unmerge_adapter()
        model(IDS)
    assert not calls


def test_trained_biases_and_hooks_take_pefts_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return cast(
            nn.Module, get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(target_modules=["0"], **options))
        )

    x = torch.randn(3, 8)
    for options in ({"bias": "all"}, {}):
        model = layer(**options)
        fast_linears(model, onednn=False)
        calls = fused_calls(model, monkeypatch)
        cast(Tensor, model(x)).sum().backward()
        biases = [p for name, p in model.named_parameters() if "bias" in name]
        assert bool(calls) == (not options)
        assert all((p.grad is not None) == bool(options) for p in biases)
        monkeypatch.undo()
    seen: list[int] = []
    model = layer()
    fast_linears(model, onednn=False)
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            module.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen == [1]


def test_names_values_and_copies_stay() -> None:
    model = tiny.adapted(dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast_linears(model, onednn=torch.backends.mkldnn.is_available())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert other(IDS).logits.abs().max() > 0  # the copy computes with its own weights


def test_switches() -> None:
    model = tiny.adapted(dtype=torch.float32)
    fast_linears(model, fused_lora=False, onednn=False)
    assert not [m for m in model.modules() if isinstance(m, FusedLoraLinear | OneDNNLinear)]
    fast_linears(model, onednn=False)
    assert len([m for m in model.modules() if isinstance(m, FusedLoraLinear)]) == 14
    assert not [m for m in model.modules() if isinstance(m, OneDNNLinear)]


@pytest.mark.parametrize("targets", ["all-linear", r".*layers\.1\..*_proj"])
def test_nothing_below_the_first_adapter_gets_a_gradient(targets: str) -> None:
    model = tiny.adapted(dtype=torch.float64, target_modules=targets).train()
    fast_linears(model)
    seen: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).requires_grad

        return hook

    inner = cast(Any, model).get_base_model().model
    inner.embed_tokens.register_forward_hook(note("embedding"))
    for index, layer in enumerate(inner.layers):
        layer.register_forward_hook(note(f"layer {index}"))
    logits_and_gradients(model)
    assert seen == {"embedding": False, "layer 0": targets == "all-linear", "layer 1": True}
