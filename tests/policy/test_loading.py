import json
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_lambdapo.config import AdapterConfig, PolicyConfig
from lightning_lambdapo.policy.loading import eos_token_ids, load_policy, load_tokenizer, save_policy
from lightning_lambdapo.policy.model import Policy, causal_lm, evaluating
from lightning_lambdapo.policy.reference import frozen_reference, reference_mode

IDS = torch.tensor([[3, 9, 14, 22, 31], [4, 8, 15, 16, 23]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


def adapter_settings(policy: Policy) -> LoraConfig:
    assert isinstance(policy, PeftModel)
    settings = policy.peft_config["default"]
    assert isinstance(settings, LoraConfig)
    return settings


def test_full_fine_tuning_trains_everything_and_its_reference_shares_no_storage(base: str) -> None:
    policy = load_policy(PolicyConfig(base), None)
    reference = frozen_reference(policy)
    assert reference is not None
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    before = logits(reference)
    assert torch.equal(before, logits(policy))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(reference), before)


def test_lora_trains_the_adapter_alone_in_float32(base: str) -> None:
    policy = load_policy(PolicyConfig(base, dtype="bfloat16"), AdapterConfig(r=4, alpha=8))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.dtype == torch.bfloat16 for name, p in policy.named_parameters() if name not in trained)
    assert frozen_reference(policy) is None
    targets = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_adapter_options_reach_peft(base: str) -> None:
    config = AdapterConfig(r=2, alpha=6, dropout=0.1, target_modules=["q_proj"], options={"use_rslora": True})
    found = adapter_settings(load_policy(PolicyConfig(base), config))
    assert (found.r, found.lora_alpha, found.lora_dropout) == (2, 6, 0.1)
    assert set(found.target_modules or []) == {"q_proj"}
    assert found.use_rslora
    own = load_policy(PolicyConfig(base), LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    assert adapter_settings(own).r == 3


def test_adapter_initialisation_is_seeded_and_leaves_the_global_state_alone(base: str) -> None:
    def adapter(seed: int) -> Tensor:
        policy = load_policy(PolicyConfig(base), AdapterConfig(r=4), seed=seed)
        return torch.cat([p.flatten() for name, p in policy.named_parameters() if "lora_A" in name])

    state = torch.random.get_rng_state()
    first = adapter(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(adapter(1), first)
    assert not torch.equal(adapter(2), first)


def test_reference_is_the_adapter_switched_off(base: str) -> None:
    policy = load_policy(PolicyConfig(base), AdapterConfig(r=4))
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    tiny.randomise(policy)
    assert not torch.allclose(logits(policy), plain)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    with reference_mode(policy):
        torch.testing.assert_close(logits(policy), plain)
    assert not torch.allclose(logits(policy), plain)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained


def test_a_continued_adapter_is_its_own_frozen_reference(base: str, tmp_path: Path) -> None:
    first = load_policy(PolicyConfig(base), AdapterConfig(r=4))
    tiny.randomise(first)
    started_from = logits(first)
    save_policy(first, tiny.tokenizer(), tmp_path / "adapter")
    policy = load_policy(PolicyConfig(base, adapter=str(tmp_path / "adapter")), None)
    torch.testing.assert_close(logits(policy), started_from)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    tiny.randomise(policy, seed=1)
    moved = logits(policy)
    with reference_mode(policy):
        torch.testing.assert_close(logits(policy), started_from)
    assert torch.equal(logits(policy), moved)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
    save_policy(policy, tiny.tokenizer(), tmp_path / "export")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "export")
    torch.testing.assert_close(logits(again), moved)


@pytest.mark.filterwarnings("ignore:The PEFT config.s `base_model_name_or_path` was renamed")
def test_an_adapter_for_another_base_is_refused(base: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    settings = AdapterConfig(r=4, target_modules=["q_proj", "up_proj"])
    save_policy(load_policy(PolicyConfig(base), settings), tiny.tokenizer(), adapter)
    wider = tmp_path / "wider"
    config = tiny.config("llama")
    config.hidden_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(wider)
    with pytest.raises(ValueError, match=r"was not made for .*wider: size mismatch.*Set `policy.model`"):
        load_policy(PolicyConfig(str(wider), adapter=str(adapter)), None)
    deeper = tmp_path / "deeper"
    config = tiny.config("llama")
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(deeper)
    with pytest.raises(ValueError, match=r"was not made for .*deeper: keys without a partner: .*layers\.2"):
        load_policy(PolicyConfig(str(deeper), adapter=str(adapter)), None)


def test_exports_load_with_from_pretrained_and_reproduce_the_logits(base: str, tmp_path: Path) -> None:
    policy = load_policy(PolicyConfig(base), AdapterConfig(r=4))
    tiny.randomise(policy)
    save_policy(policy, load_tokenizer(PolicyConfig(base)), tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(policy))
    assert (tmp_path / "adapter" / "tokenizer.json").exists()
    full = load_policy(PolicyConfig(base), None)
    with torch.no_grad():
        next(full.parameters()).add_(0.1)
    save_policy(full, load_tokenizer(PolicyConfig(base)), tmp_path / "full")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert all(torch.equal(value, full.state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(logits(loaded), logits(full), rtol=1e-5, atol=1e-5)  # other kernels


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_gradients_after_an_eval_forward_are_those_of_the_dequantised_model(base: str, quantization: str) -> None:
    policy = load_policy(PolicyConfig(base, quantization=quantization), AdapterConfig(r=4))  # type: ignore[arg-type]
    tiny.randomise(policy)
    with torch.no_grad(), evaluating(policy):
        cast(Any, causal_lm(policy)).generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    twin = load_policy(PolicyConfig(base), AdapterConfig(r=4))
    from bitsandbytes.functional import dequantize_4bit

    quantised = {name: m.base_layer for name, m in policy.named_modules() if hasattr(m, "base_layer")}
    with torch.no_grad():
        for name, module in twin.named_modules():
            if name in quantised:
                weight = quantised[name].weight
                assert weight.dtype == torch.uint8
                module.base_layer.weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    tiny.randomise(twin)
    gradients = []
    for model in (policy, twin):
        model(IDS).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


def test_int8_builds_and_trains(base: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = load_policy(PolicyConfig(base, quantization="int8"), AdapterConfig(r=4))
    policy(IDS).logits.square().mean().backward()
    assert not caplog.records  # bitsandbytes would log a line for every product
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


def test_base_dropout_is_silenced_and_the_adapters_kept(tmp_path: Path) -> None:
    tiny.model("gpt2").save_pretrained(tmp_path / "gpt2")  # its configuration drops out with probability 0.1
    full = load_policy(PolicyConfig(str(tmp_path / "gpt2")), None)
    full.train()
    assert torch.equal(logits(full), logits(full))
    dropping = load_policy(
        PolicyConfig(str(tmp_path / "gpt2")), AdapterConfig(r=4, dropout=0.5, options={"fan_in_fan_out": True})
    )
    tiny.randomise(dropping)
    dropping.train()
    assert not torch.equal(logits(dropping), logits(dropping))


def test_gradient_checkpointing_changes_no_gradient(base: str) -> None:
    gradients = []
    for flag in (False, True):
        policy = load_policy(PolicyConfig(base, gradient_checkpointing=flag), AdapterConfig(r=4))
        tiny.randomise(policy)
        policy.train()
        assert any(getattr(layer, "gradient_checkpointing", False) for layer in policy.modules()) == flag
        policy(IDS).logits.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_end_ids_come_from_everywhere(base: str) -> None:
    model = causal_lm(load_policy(PolicyConfig(base), None))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [7, 9]
    model.config.eos_token_id = 5
    assert eos_token_ids(model, tiny.tokenizer()) == (1, 5, 7, 9)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no completion could ever end"):
        eos_token_ids(model, tokenizer)


def test_bad_settings_are_refused_before_loading(base: str) -> None:
    with pytest.raises(ValueError, match=r"`policy\.model` is empty"):
        PolicyConfig("")
    with pytest.raises(ValueError, match=r"GGUF file that does not exist: /no/such\.gguf"):
        PolicyConfig("/no/such.gguf")
    with pytest.raises(ValueError, match="nf4 and there is no adapter: quantised weights cannot be trained"):
        load_policy(PolicyConfig(base, quantization="nf4"), None)
    with pytest.raises(ValueError, match=r"Both `lora` and `policy\.adapter` \(x\) are set"):
        load_policy(PolicyConfig(base, adapter="x"), AdapterConfig())


def test_builtin_policy_is_small_and_loads() -> None:
    config = PolicyConfig("builtin:arithmetic")
    policy = load_policy(config, None)
    assert sum(p.numel() for p in policy.parameters()) < 1_000_000
    tokenizer = load_tokenizer(config)
    assert tokenizer.decode(tokenizer("1+22=;")["input_ids"]) == "1+22=;"


def test_no_reference_is_built_where_none_is_wanted(base: str, tmp_path: Path) -> None:
    save_policy(load_policy(PolicyConfig(base), AdapterConfig(r=4)), tiny.tokenizer(), tmp_path / "a")
    config = PolicyConfig(base, adapter=str(tmp_path / "a"))
    with_one, without = (load_policy(config, None, reference=flag) for flag in (True, False))
    assert any(".reference." in name for name, _ in with_one.named_parameters())
    assert not any(".reference." in name for name, _ in without.named_parameters())
    torch.testing.assert_close(logits(with_one), logits(without))


def test_saved_adapter_holds_no_second_adapter(base: str, tmp_path: Path) -> None:
    save_policy(load_policy(PolicyConfig(base), AdapterConfig(r=4)), tiny.tokenizer(), tmp_path / "a")
    save_policy(load_policy(PolicyConfig(base, adapter=str(tmp_path / "a")), None), tiny.tokenizer(), tmp_path / "b")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 4
