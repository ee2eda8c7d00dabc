"""The weights of a rollout: merged, cast or dequantised once, and gone afterwards."""

import gc
import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytest
import tiny
import torch
from gradients import IDS
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from where import DEVICE

from lightning_lambdapo.config import AdapterConfig, PerformanceConfig, PolicyConfig, SamplingConfig
from lightning_lambdapo.policy.decoding import decoding_weights
from lightning_lambdapo.policy.loading import load_policy
from lightning_lambdapo.policy.lora import fast_linears
from lightning_lambdapo.policy.model import causal_lm
from lightning_lambdapo.policy.probing import ProbeRow, difference, own_logprobs
from lightning_lambdapo.rollout import GroupedEngine
from lightning_lambdapo.rollout.sampling import row_uniforms


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, cache_enabled=False)


def decoding(policy: nn.Module, merge: bool | None = None, gigabytes: float | None = None) -> Any:
    return decoding_weights(policy, PerformanceConfig(merge_adapter=merge, decoding_weights_gb=gigabytes))


def lora_layers(policy: nn.Module) -> list[Any]:
    return [module for module in policy.modules() if hasattr(module, "lora_A")]


def logits(policy: nn.Module) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, cast(Any, policy)(IDS).logits)


def count(policy: PeftModel, wanted: bool | None) -> int:
    with decoding(policy, wanted):
        return sum(layer.merged for layer in lora_layers(policy))


def test_what_is_merged() -> None:
    assert count(tiny.adapted(dtype=torch.float32, scale=1.0), None) == 14  # on the CPU
    assert count(tiny.adapted(dtype=torch.float32, scale=1.0), True) == 14
    assert count(tiny.adapted(dtype=torch.float32, scale=1.0), False) == 0
    assert count(tiny.adapted(dtype=torch.bfloat16, scale=1.0), None) == 0  # it would round
    assert count(tiny.adapted(dtype=torch.bfloat16, scale=1.0), True) == 14
    with autocast():
        assert count(tiny.adapted(dtype=torch.float32, scale=1.0), None) == 0
        assert count(tiny.adapted(dtype=torch.float32, scale=1.0), True) == 14
    policy = tiny.adapted(dtype=torch.float32, scale=1.0)
    with policy.disable_adapter():
        assert count(policy, True) == 0  # and without a warning
    with pytest.raises(RuntimeError, match="midway"), decoding(policy, True):
        raise RuntimeError("midway")
    assert not any(layer.merged for layer in lora_layers(policy))


def test_merging_nothing_is_said_once() -> None:
    cases = {
        "the adapter is not plain LoRA": tiny.adapted(dtype=torch.float32, use_dora=True),
        "it has no LoRA layer": tiny.model(),
    }
    for reason, policy in cases.items():
        with pytest.warns(UserWarning, match=f"merge_adapter` is true, but no layer .* can be merged: {reason}"):
            count(cast(PeftModel, policy), True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert count(cast(PeftModel, policy), True) == 0
            assert count(cast(PeftModel, policy), None) == 0


def test_gpt2_adapters_are_merged_the_right_way_round() -> None:
    settings = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    policy = cast(PeftModel, get_peft_model(tiny.model("gpt2", dtype=torch.float64), settings)).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = policy(ids).logits
    with decoding(policy, True):
        assert any(layer.merged for layer in policy.modules() if isinstance(layer, LoraLinear))
        torch.testing.assert_close(policy(ids).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_rounds_once(dtype: torch.dtype) -> None:
    """To bfloat16, from a float32 sum: the nearest of its numbers, but for ties that float32 cannot tell."""
    policy = tiny.adapted(dtype=dtype, scale=0.01)
    with autocast(), decoding(policy, True):
        for layer in lora_layers(policy):
            up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            found = layer.get_base_layer().weight
            assert found.dtype == torch.bfloat16
            assert up.dtype == torch.float32
            with torch.autocast(DEVICE.type, enabled=False):
                update = layer.scaling["default"] * up.double() @ down.double()
            layer.expected = update, found.detach().clone()
    for layer in lora_layers(policy):
        update, found = layer.expected
        exact = layer.get_base_layer().weight.double() + update
        assert (found == exact.to(torch.bfloat16)).double().mean() > 0.999
        assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casting_once_is_what_autocast_does_each_time(dtype: torch.dtype, fused: bool) -> None:
    policy = tiny.adapted(dtype=dtype, scale=1.0)
    if fused:
        fast_linears(policy, onednn=False)
    with autocast():
        expected = logits(policy)
        for gigabytes in (0.0, 1.0):
            with decoding(policy, False, gigabytes):
                for layer in lora_layers(policy):
                    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
                    kept = torch.bfloat16 if gigabytes else dtype
                    assert layer.get_base_layer().weight.dtype == kept
                assert torch.equal(logits(policy), expected)
    assert all(layer.lora_B["default"].weight.dtype == torch.float32 for layer in lora_layers(policy))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny.model("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def quantised(base: str, kind: Any, dtype: Any) -> PeftModel:
    policy = cast(PeftModel, load_policy(PolicyConfig(base, quantization=kind, dtype=dtype), AdapterConfig(r=4)))
    tiny.shake(policy, 0.1)
    return policy


def bases(policy: nn.Module) -> list[Any]:
    return [layer.get_base_layer() for layer in lora_layers(policy)]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_weights_are_dequantised_once(base: str, kind: str, dtype: str, merge: bool) -> None:
    policy = quantised(base, kind, dtype)
    expected = logits(policy).float()
    before = [(layer, layer.weight, layer.weight.data.clone()) for layer in bases(policy)]
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    with decoding(policy, merge, 1.0):
        assert all(type(layer).__name__ == "_Dequantized" for layer in bases(policy))
        assert {layer.weight.dtype for layer in bases(policy)} == {getattr(torch, dtype)}
        copies = [weakref.ref(layer.weight) for layer in bases(policy)]
        assert all(layer.merged == merge for layer in lora_layers(policy))
        found = logits(policy).float()
    error = (found - expected).norm() / expected.norm()
    if kind == "int8":
        assert error < 0.05  # the quantised layer rounds activations to 8 bits, too
    else:
        assert error < (1e-5 if dtype == "float32" else 0.02)
    gc.collect()
    assert not any(copy() is not None for copy in copies)
    for layer, (module, weight, data) in zip(bases(policy), before, strict=True):
        assert layer is module
        assert layer.weight is weight
        assert torch.equal(layer.weight.data, data)
    after = policy.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert torch.equal(logits(policy).float(), expected)
    assert not any(layer.merged for layer in lora_layers(policy))


def test_copies_keep_to_their_budget(base: str) -> None:
    policy = quantised(base, "nf4", "bfloat16")

    def dequantised(gigabytes: float | None) -> int:
        with decoding(policy, None, gigabytes):
            return sum(type(layer).__name__ == "_Dequantized" for layer in bases(policy))

    assert dequantised(None) == dequantised(0.0) == 0  # on the CPU
    assert dequantised(1.0) == 14
    sizes = [32 * 32, 16 * 32, 16 * 32, 32 * 32, 64 * 32, 64 * 32, 64 * 32]  # of one layer, in bfloat16 2 bytes each
    assert dequantised(2 * sum(sizes) / 1e9) == 7
    with pytest.warns(UserWarning, match="the base is quantised, see `performance.decoding_weights_gb`"):
        assert count(policy, True) == 0
    with pytest.raises(ValueError, match=r"`performance.decoding_weights_gb` must be at least 0 .*, got -1"):
        PerformanceConfig(decoding_weights_gb=-1)


@pytest.mark.parametrize("context", [nullcontext, autocast])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kind", ["nf4", None])
def test_a_rollout_is_within_16_bit_noise_of_the_policy(base: str, kind: str | None, merge: bool, context: Any) -> None:
    """The log-probabilities of a rollout with copies against those of the policy without, on the same tokens."""
    policy = quantised(base, kind, "bfloat16")
    model = causal_lm(policy)
    batch = tiny.batch(tiny.ragged_prompts(3))
    uniforms = row_uniforms(
        seed=0, stage="train", step=0, prompt_ids=[0, 1, 2], occurrences=[0] * 3, num_samples=4, length=12
    )
    engine = GroupedEngine(tiny.tokenizer(), (-1,), 0, **tiny.configured(merge_adapter=merge, decoding_weights_gb=1.0))
    with torch.no_grad(), context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = engine.generate(model, batch, sampling=SamplingConfig(), uniforms=uniforms)
        rows = [
            ProbeRow(batch.input_ids[row // 4][batch.attention_mask[row // 4]], ids)
            for row, ids in enumerate(found.completion_ids)
        ]
        assert difference(found.sampling_logprobs.flatten(), own_logprobs(model, rows)) is None
