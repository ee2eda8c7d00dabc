"""vLLM inside the training process: its tokens come from the policy that is trained, whatever is trained of it."""

import math
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from served import write_model
from small import fit, module
from transformers import AutoModelForCausalLM

from lightning_lambdapo import AdapterConfig, PolicyConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.engine_settings import VLLMConfig
from lightning_lambdapo.functional import logprobs_from_logits
from lightning_lambdapo.policy.loading import load_policy
from lightning_lambdapo.policy.model import Policy, causal_lm
from lightning_lambdapo.rollout.sampling import row_uniforms
from lightning_lambdapo.rollout.vllm.engine import VLLMEngine
from lightning_lambdapo.rollout.vllm.weights import base_directory

ROLLOUT = RolloutConfig(group_size=4, max_new_tokens=16, engine="vllm")


def engine(config: PolicyConfig, **settings: Any) -> VLLMEngine:
    return VLLMEngine(tiny.tokenizer(), (1,), 0, config, VLLMConfig(**settings))


def sampled(engine: VLLMEngine, policy: Policy, batch: PromptBatch, *, temperature: float = 1.0) -> Rollout:
    key: dict[str, Any] = {"stage": "train", "prompt_ids": batch.prompt_ids.tolist(), "step": 0, "seed": 5}
    uniforms = row_uniforms(occurrences=[0] * len(batch.prompts), num_samples=3, length=20, **key)
    settings = SamplingConfig(temperature=temperature)
    return engine.generate(causal_lm(policy), batch, sampling=settings, uniforms=uniforms)


@torch.no_grad()
def largest_error(policy: Policy, batch: PromptBatch, rollout: Rollout, *, temperature: float = 1.0) -> float:
    """Between the engine's log-probabilities and those of the policy's own forward, row by row."""
    worst = 0.0
    for row, length in enumerate(rollout.lengths.tolist()):
        prompt = batch.input_ids[row // 3][batch.attention_mask[row // 3].bool()]
        tokens = rollout.completion_ids[row, :length]
        logits = policy(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        own = logprobs_from_logits(logits, tokens, temperature=temperature)
        worst = max(worst, (own - rollout.sampling_logprobs[row, :length]).abs().max().item())
    return worst


def change(policy: Policy, scale: float) -> None:
    """Move what is trained, as an update would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


PATTERNS = {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 2, "o_proj": 11}}


@pytest.mark.parametrize(
    ("settings", "lora"),
    [
        ({}, None),
        ({}, AdapterConfig(r=4, alpha=12)),
        ({}, AdapterConfig(r=4, alpha=12, options=PATTERNS)),
        ({"quantization": "nf4"}, AdapterConfig(r=4)),
        ({"quantization": "int8"}, AdapterConfig(r=4)),
    ],
    ids=["full", "lora", "patterns", "nf4", "int8"],
)
def test_every_version_is_decoded(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, lora: AdapterConfig | None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = PolicyConfig(served, **settings)
    policy = load_policy(config, lora)
    batch = tiny.batch(tiny.ragged_prompts(3))
    allowed = 0.5 if settings.get("quantization") == "int8" else 1e-3  # int8 also rounds activations
    vllm = engine(config)
    try:
        found = []
        state = torch.get_rng_state()
        for version in (1, 2, 3):
            vllm.sync(policy, version)
            assert torch.equal(state, torch.get_rng_state())
            rollout = sampled(vllm, policy, batch, temperature=0.8)
            assert largest_error(policy, batch, rollout, temperature=0.8) < allowed
            assert rollout.entropy is None
            found.append(rollout.completion_ids.tolist())
            change(policy, 0.3)
        assert found[0] != found[1] != found[2]
        assert largest_error(policy, batch, rollout, temperature=0.8) > 0.5
    finally:
        vllm.close()


def test_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    """For a CPU vLLM packs a copy of the head's weight, which must be made anew with all weights trained."""
    tied = PolicyConfig(write_model(tmp_path, tie_word_embeddings=True))
    policy = load_policy(tied, None)
    batch = tiny.batch(tiny.ragged_prompts(3))
    vllm = engine(tied)
    try:
        for version in (1, 2):
            vllm.sync(policy, version)
            assert largest_error(policy, batch, sampled(vllm, policy, batch)) < 1e-3
            change(policy, 0.3)
    finally:
        vllm.close()


def test_an_adapter_that_changes_its_base(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = PolicyConfig(served)
    policy = load_policy(config, AdapterConfig(r=4, options={"init_lora_weights": "pissa"}))
    batch = tiny.batch(tiny.ragged_prompts(3))
    vllm = engine(config)
    try:
        vllm.sync(policy, 1)
        assert largest_error(policy, batch, sampled(vllm, policy, batch)) < 1e-3
    finally:
        vllm.close()


def test_the_cached_base_is_told_from_one_with_the_same_codes(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 4 bits a matrix and half of it have the same codes and other scales."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    half = AutoModelForCausalLM.from_pretrained(served)
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            if "_proj" in name:
                parameter.mul_(0.5)
    half.save_pretrained(tmp_path / "half")
    places = set()
    for place in (served, str(tmp_path / "half")):
        config = PolicyConfig(place, quantization="nf4")
        places.add(base_directory(load_policy(config, AdapterConfig(r=4)), config)[0])
    assert len(places) == 2


def test_a_row_is_its_own_whatever_is_beside_it(served: str) -> None:
    """Its seed comes from its own stream: the same tokens in another batch, as after a resume or on more ranks."""
    config = PolicyConfig(served)
    policy = load_policy(config, None)
    batch = tiny.batch(tiny.ragged_prompts(4))
    vllm = engine(config)
    try:
        vllm.sync(policy, 1)
        whole, part = sampled(vllm, policy, batch), sampled(vllm, policy, batch.select([2, 0]))
        assert whole.texts[6:9] + whole.texts[:3] == part.texts
        assert len(set(whole.texts)) > 8  # rows of one prompt differ
    finally:
        vllm.close()


def test_ends_and_texts(served: str) -> None:
    config = PolicyConfig(served)
    policy = load_policy(config, None)
    batch = tiny.batch(tiny.ragged_prompts(4))
    vllm = VLLMEngine(tiny.tokenizer(), range(1, 8), 0, config)  # often an end
    try:
        vllm.sync(policy, 1)
        rollout = sampled(vllm, policy, batch)
        ended = 0
        for ids, mask, truncated, text in zip(
            rollout.completion_ids, rollout.completion_mask, rollout.truncated, rollout.texts, strict=True
        ):
            kept = ids[mask].tolist()
            assert all(token > 7 for token in kept[:-1])
            assert truncated == (kept[-1] > 7)
            assert text == tiny.tokenizer().decode(kept, skip_special_tokens=True)
            assert not ids[~mask].any()
            ended += not truncated
        assert ended > 0
    finally:
        vllm.close()


@pytest.mark.parametrize("kind", ["full", "lora", "nf4"])
def test_training(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings: dict[str, Any] = {} if kind == "full" else {"lora": AdapterConfig(r=4)}
    policy = PolicyConfig(served, quantization="nf4" if kind == "nf4" else None)
    model = module(served, policy=policy, rollout=ROLLOUT, **settings)
    steps = fit(tmp_path, model, max_epochs=2)
    assert len(steps) == 8
    for step in steps:
        assert step["train/sampling_drift"] < 1e-4
        assert step["train/importance_ratio_mean"] == pytest.approx(1, abs=1e-4)  # it is on: the engine is not ours
    assert 2 < steps[0]["train/entropy"] < math.log(49)  # by the learning pass
    assert model.sampler.delivery.version == 8
    evidence = model.sampler.delivery.evidence["previous"]
    assert evidence.square > 0.1  # updates could be seen
    assert abs(evidence.share) < 0.01


def test_the_models_own_sampling_settings_do_not_count(served: str, tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(served)
    policy.generation_config.update(do_sample=True, top_k=3, temperature=0.1, repetition_penalty=1.5)
    policy.save_pretrained(tmp_path)
    vllm = engine(PolicyConfig(str(tmp_path)))
    try:
        vllm.sync(policy, 1)
        batch = tiny.batch(tiny.ragged_prompts(3))
        assert largest_error(policy, batch, sampled(vllm, policy, batch)) < 1e-4
    finally:
        vllm.close()


def test_validation_may_filter_and_decode_greedily(served: str, tmp_path: Path) -> None:
    vllm = engine(PolicyConfig(served))
    policy = cast(Any, load_policy(PolicyConfig(served), None))
    batch = tiny.batch(tiny.ragged_prompts(2))
    try:
        vllm.sync(policy, 1)
        uniforms = row_uniforms(
            seed=0, stage="val", step=0, prompt_ids=[0, 1], occurrences=[0, 0], num_samples=1, length=6
        )
        found = vllm.generate(policy, batch, sampling=SamplingConfig(temperature=0.0), uniforms=uniforms)
        for row in range(2):
            ids = batch.input_ids[row][batch.attention_mask[row].bool()]
            for token in found.completion_ids[row][found.completion_mask[row]].tolist():
                assert token == policy(ids[None]).logits[0, -1].argmax()
                ids = torch.cat([ids, torch.tensor([token])])
        few = vllm.generate(policy, batch, sampling=SamplingConfig(top_k=1), uniforms=uniforms)
        assert few.completion_ids.tolist() == found.completion_ids.tolist()
    finally:
        vllm.close()


def test_a_module_can_be_used_again_after_its_engine_was_closed(served: str, tmp_path: Path) -> None:
    model = module(served, rollout=ROLLOUT, lora=AdapterConfig(r=4))
    fit(tmp_path, model)
    assert isinstance(model.engine, VLLMEngine)
    assert model.engine._llm is None
    assert fit(tmp_path / "again", model)[-1]["train/sampling_drift"] < 1e-4


def test_an_engine_that_does_not_start(served: str) -> None:
    """The error names the model and a way out, and a later engine starts."""
    policy = load_policy(PolicyConfig(served), None)
    with pytest.raises(RuntimeError, match=rf"vLLM does not start with {served}: .*set `rollout.engine: grouped`"):
        engine(PolicyConfig(served), options={"block_size": 16}).sync(policy, 1)  # vLLM's CPU kernels want 32
    vllm = engine(PolicyConfig(served))
    vllm.sync(policy, 1)
    vllm.close()
