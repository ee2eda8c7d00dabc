"""Every setting of peft's LoraConfig: the reference is the policy before training, and an export is the policy."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from small import Recorder, Rows, module, trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_lambdapo import AdapterConfig, PolicyConfig, RolloutCheckpoint
from lightning_lambdapo.commands.export import merge_adapter
from lightning_lambdapo.policy.adapter_options import REFUSED_OPTIONS, REFUSED_STARTS, check_adapter
from lightning_lambdapo.policy.loading import load_policy, save_policy
from lightning_lambdapo.policy.reference import answering_as_reference, frozen_reference

IDS = torch.tensor([[3, 9, 14, 22, 31], [4, 8, 15, 16, 23]])
BLOCKS = {
    "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "nblocks": 2,
}
#: Options that work, each with the architectures to try it with.
WORKING: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ("llama", "gpt2", "qwen3")),
    ({"init_lora_weights": True}, ("llama",)),
    ({"init_lora_weights": False}, ("llama", "gpt2", "qwen3")),
    ({"init_lora_weights": False, "modules_to_save": ["lm_head"]}, ("llama",)),
    ({"init_lora_weights": False, "use_dora": True}, ("llama",)),
    ({"init_lora_weights": "gaussian"}, ("llama",)),
    ({"init_lora_weights": "orthogonal"}, ("llama",)),
    ({"init_lora_weights": "pissa"}, ("llama", "gpt2", "qwen3")),
    ({"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}}, ("llama",)),
    ({"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}, ("llama",)),
    ({"init_lora_weights": "olora"}, ("llama", "qwen3")),
    ({"bias": "all"}, ("llama", "gpt2")),
    ({"bias": "lora_only"}, ("gpt2",)),
    ({"bias": "all", "init_lora_weights": "pissa"}, ("gpt2",)),
    ({"use_rslora": True}, ("llama",)),
    ({"use_dora": True}, ("llama",)),
    ({"lora_bias": True}, ("gpt2",)),
    ({"modules_to_save": ["lm_head"]}, ("llama", "qwen3")),
    ({"modules_to_save": ["embed_tokens"]}, ("qwen3",)),
    ({"trainable_token_indices": [3, 4, 9]}, ("llama", "qwen3")),
    ({"rank_pattern": {"q_proj": 2}}, ("llama",)),
    ({"alpha_pattern": {"q_proj": 3}}, ("llama",)),
    ({"exclude_modules": ["q_proj"]}, ("llama",)),
    ({"layers_to_transform": [1], "layers_pattern": "layers"}, ("llama",)),
    ({"fan_in_fan_out": True}, ("gpt2",)),
    ({"use_bdlora": BLOCKS}, ("llama",)),
    ({"target_parameters": ["down_proj.weight"]}, ("llama",)),
]
#: Settings that need no case of their own: named by ``AdapterConfig``, or without an effect on the policy.
NEUTRAL = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "peft_type"),
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "megatron_core", "qalora_group_size"),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:fan_in_fan_out is set to",
    "ignore:Using Rank-Stabilized LoRA",
    "ignore:.*target_parameters.*",
    "ignore:.*but `ensure_weight_tying` is not set to True",
    "ignore:Input and output embeddings are no longer tied after merging",
    "ignore:.*LoRA tensor.* have invalid shape:peft.utils.warning.PeftWarning",
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name in ("llama", "gpt2", "qwen3"):
        found[name] = str(tmp_path_factory.mktemp(name))
        model = tiny.model(name)
        with torch.no_grad():
            for parameter in model.parameters():  # biases that count, and norms that differ
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(found[name])
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, cast(Any, model.eval())(IDS).logits)


def train(policy: nn.Module) -> None:
    """Change all that is trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def adapter(options: dict[str, Any]) -> AdapterConfig:
    targets: Any = ["q_proj", "k_proj"] if "layers_pattern" in options or "target_parameters" in options else None
    return AdapterConfig(r=4, alpha=12, target_modules=targets or "all-linear", options=options)


CASES = [(architecture, options) for options, architectures in WORKING for architecture in architectures]


@pytest.mark.parametrize(("architecture", "options"), CASES, ids=str)
def test_reference_export_and_merged_model(
    bases: dict[str, str], tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    config = PolicyConfig(bases[architecture])
    state = torch.get_rng_state()
    policy = load_policy(config, adapter(options))
    start = logits(policy)
    reference = frozen_reference(policy)
    assert torch.equal(torch.get_rng_state(), state)
    plain = AutoModelForCausalLM.from_pretrained(config.model)
    if options.get("init_lora_weights") is not False:
        torch.testing.assert_close(start, logits(plain), rtol=0, atol=2e-5)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained
    assert not [name for name in trained if "reference" in name]
    for moved in (False, True):
        with torch.no_grad(), answering_as_reference(policy, reference):
            found = cast(Any, policy if reference is None else reference)(IDS).logits
        torch.testing.assert_close(found, start, rtol=0, atol=5e-6)
        assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == trained
        if not moved:
            train(policy)
    expected = logits(policy)
    assert (expected - start).abs().max() > 0.05
    save_policy(policy, tiny.tokenizer(), tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-5)
    merge_adapter(cast(PeftModel, policy)).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_export_is_for_the_unchanged_base(bases: dict[str, str], tmp_path: Path, start: str) -> None:
    """W + s B A of the files, computed by hand as vLLM does, is the weight that the policy computes with."""
    policy = load_policy(PolicyConfig(bases["llama"]), adapter({"init_lora_weights": start}))
    train(policy)
    save_policy(policy, tiny.tokenizer(), tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    settings = LoraConfig.from_pretrained(str(tmp_path))
    assert (settings.r, settings.lora_alpha, settings.init_lora_weights) == (8, 24, True)
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"]).state_dict()
    layers = {name: layer for name, layer in policy.named_modules() if hasattr(layer, "base_layer")}
    assert len(layers) == 14
    for name, layer in layers.items():
        down, up = (held[f"{name}.lora_{part}.weight"] for part in "AB")
        computed = layer.base_layer.weight + layer.get_delta_weight("default")
        weight = plain[f"{name.removeprefix('base_model.model.')}.weight"] + 3.0 * up @ down
        torch.testing.assert_close(weight, computed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": False}, {"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str
)
def test_kl_is_zero_before_the_first_update_and_resumes(bases: dict[str, str], tmp_path: Path, options: Any) -> None:
    """And a resumed run measures the same KL: its reference is that of the run's start, not of the checkpoint."""
    base = bases["gpt2"]
    tiny.tokenizer().save_pretrained(base)

    def run(steps: int, resume: Path | None = None) -> list[float]:
        saving, recorder = RolloutCheckpoint(every_n_rollouts=2, dirpath=tmp_path / str(steps)), Recorder()
        built = trainer(tmp_path, callbacks=[saving, recorder], enable_checkpointing=True, max_steps=steps)
        model = module(base, lora=AdapterConfig(r=4, options=options), algorithm={"log_kl": True})
        built.fit(model, Rows(batch_size=4), ckpt_path=resume)
        return [step["train/kl"] for step in recorder.steps]

    whole = run(4)
    assert abs(whole[0]) < 1e-9
    assert min(whole[1:]) > 1e-4
    run(2)
    assert run(3, tmp_path / "2" / "last.ckpt") == whole[2:3]


def test_every_option_is_decided() -> None:
    """A release of peft with another option fails here, and somebody has to decide."""
    decided = {*REFUSED_OPTIONS, *NEUTRAL, *(name for options, _ in WORKING for name in options)}
    assert {each.name for each in dataclasses.fields(LoraConfig) if each.init} == decided


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_refused_options(bases: dict[str, str], name: str) -> None:
    with pytest.raises(ValueError, match=rf"`lora\.options\.{name}` cannot be used here: .*\. Remove it\."):
        load_policy(PolicyConfig(bases["llama"]), AdapterConfig(options={name: {}}))


@pytest.mark.parametrize("start", REFUSED_STARTS)
def test_refused_initial_weights(bases: dict[str, str], start: str) -> None:
    value = "pissa_niter_4" if start == "pissa_niter" else start
    with pytest.raises(ValueError, match=rf"init_lora_weights` is '{value}', wh.*Use true, 'gaussian'"):
        load_policy(PolicyConfig(bases["llama"]), AdapterConfig(options={"init_lora_weights": value}))


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"options": {"r": 3}}, r"`lora\.options\.r` is set by `lora` itself, so set `lora\.r` instead"),
        ("llama", {"options": {"task_type": "CAUSAL_LM"}}, r"so remove it\."),
        ("llama", {"options": {"rnak": 3}}, r"peft does not accept `lora` with the options \{'rnak': 3\}: .*rnak"),
        ("gpt2", {"options": {"init_lora_weights": "olora"}}, "computes wrongly for the transposed layers of GPT2"),
        (
            "qwen3",
            {"options": {"init_lora_weights": "pissa"}, "target_modules": ["lm_head"]},
            r"output head share theirs\. Remove both from `lora\.target_modules`",
        ),
        (
            "llama",
            {"options": {"init_lora_weights": "pissa", "use_dora": True}},
            "use_dora` cannot be combined with `init_lora_weights: pissa`",
        ),
    ],
)
def test_refused_combinations(bases: dict[str, str], architecture: str, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(PolicyConfig(bases[architecture]), AdapterConfig(r=4, **settings))


def test_a_changed_base_cannot_be_quantised(bases: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"quantising the changed base gives another policy\. Set `policy\.quant"):
        load_policy(PolicyConfig(bases["llama"], quantization="nf4"), adapter({"init_lora_weights": "pissa"}))


def test_pefts_own_settings_are_checked_too(bases: dict[str, str]) -> None:
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=[3])
    with pytest.raises(ValueError, match="alora_invocation_tokens` cannot be used here"):
        load_policy(PolicyConfig(bases["llama"]), settings)
    check_adapter(LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), quantized=True)


def test_an_adapter_that_changed_its_base_is_not_continued(bases: dict[str, str], tmp_path: Path) -> None:
    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa").save_pretrained(
        str(tmp_path)
    )
    with pytest.raises(ValueError, match=r"belongs to a base that its initialisation has changed .*'pissa'"):
        load_policy(PolicyConfig(bases["llama"], adapter=str(tmp_path)), None)


def test_a_continued_adapter_that_trains_biases(bases: dict[str, str], tmp_path: Path) -> None:
    first = load_policy(PolicyConfig(bases["gpt2"]), adapter({"bias": "all"}))
    train(first)
    save_policy(first, tiny.tokenizer(), tmp_path)
    policy = load_policy(PolicyConfig(bases["gpt2"], adapter=str(tmp_path)), None)
    start, reference = logits(policy), frozen_reference(policy)
    torch.testing.assert_close(start, logits(first), rtol=0, atol=1e-5)
    train(policy)
    assert reference is not None
    torch.testing.assert_close(logits(reference), start, rtol=0, atol=1e-6)


ENDS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embedding", "attention"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embedding", "lm_head"]},
    "random": {"target_modules": ["embedding"], "options": {"init_lora_weights": False}},
}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "llama"])
def test_adapted_ends_are_merged(bases: dict[str, str], tmp_path: Path, architecture: str, ends: str) -> None:
    """Those of Qwen3 and GPT-2 share their weights, of which the policy adapts one end alone or each by its own."""
    settings: dict[str, Any] = dict(ENDS[ends])
    embedding, attention = ("wte", "c_attn") if architecture == "gpt2" else ("embed_tokens", "q_proj")
    names = {"embedding": embedding, "attention": attention}
    settings["target_modules"] = [names.get(name, name) for name in settings["target_modules"]]
    policy = load_policy(PolicyConfig(bases[architecture]), AdapterConfig(r=4, alpha=12, **settings))
    train(policy)
    expected = logits(policy)
    merge_adapter(cast(PeftModel, policy)).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-5)
    assert again.config.tie_word_embeddings is False
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(bases[architecture]))).abs().max() > 0.1


def test_ends_that_are_not_adapted_stay_tied(bases: dict[str, str], tmp_path: Path) -> None:
    policy = load_policy(PolicyConfig(bases["qwen3"]), adapter({}))
    merge_adapter(cast(PeftModel, policy)).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings is True


def test_what_cannot_be_merged_is_said(bases: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match="lora_bias=True"):
        policy = load_policy(PolicyConfig(bases["llama"]), adapter({"lora_bias": True}))
    with pytest.raises(ValueError, match=r"The adapter cannot be merged: .*Export it without --merge\."):
        merge_adapter(cast(PeftModel, policy))
