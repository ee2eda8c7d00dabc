"""A GPU computes what the CPU computes, and trains in the precisions that users train in."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import fitting
import pytest
import tiny
import torch
from fitting import train
from gradients import gradient
from small import equal, fit, module, weights
from torch import Tensor

from lightning_lambdapo import AdapterConfig, PolicyConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.learning.packing import MicroBatch
from lightning_lambdapo.learning.scoring import CompletionScorer
from lightning_lambdapo.rollout import GroupedEngine
from lightning_lambdapo.rollout.sampling import row_uniforms

pytestmark = pytest.mark.gpu


def to(thing: Any, device: str) -> Any:
    """A rollout on another device."""
    values = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    tensors = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(thing, **tensors)


def sampled(model: Any, batch: PromptBatch) -> Rollout:
    key: dict[str, Any] = {"stage": "train", "prompt_ids": range(4), "occurrences": [0] * 4}
    uniforms = row_uniforms(seed=0, step=0, num_samples=4, length=20, **key)
    with torch.no_grad():
        return GroupedEngine(tiny.tokenizer(), (1,), 0).generate(
            model, batch, sampling=SamplingConfig(), uniforms=uniforms
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral", "phi3", "gpt2"])
def test_tokens_and_gradients_are_those_of_the_cpu(architecture: str) -> None:
    here = tiny.model(architecture, dtype=torch.float64).cpu()
    there = cast(Any, copy.deepcopy(here)).cuda()
    batch = tiny.batch(tiny.ragged_prompts(4))
    found: list[tuple[list[list[int]], Tensor]] = []
    for model, device in ((here, "cpu"), (there, "cuda")):
        tensors = {name: getattr(batch, name).to(device) for name in ("input_ids", "attention_mask", "prompt_ids")}
        moved = batch._replace(**tensors)
        rollout = sampled(model, moved)
        scorer = CompletionScorer(model, temperature=1.0)
        scorer(MicroBatch.packed(moved, to(rollout, device), torch.arange(16, device=device))).sum().backward()
        found.append((rollout.completion_ids.tolist(), gradient(model).cpu()))
    assert found[0][0] == found[1][0]
    error = (found[0][1] - found[1][1]).norm() / found[0][1].norm()
    assert error < 1e-6  # the learning pass has float32 parts


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_in_every_precision(base: str, tmp_path: Path, precision: str) -> None:
    model = module(base, lora=AdapterConfig(r=4))
    steps = fit(tmp_path, model, accelerator="gpu", precision=precision)
    assert len(steps) == 4
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_a_4_bit_base(base: str, tmp_path: Path) -> None:
    policy = PolicyConfig(base, dtype="bfloat16", quantization="nf4", gradient_checkpointing=True)
    rollout = RolloutConfig(group_size=4, max_new_tokens=8)
    model = module(base, policy=policy, lora=AdapterConfig(r=4), rollout=rollout)
    assert len(fit(tmp_path, model, accelerator="gpu", precision="bf16-mixed")) == 4


@pytest.mark.parametrize("kind", ["dropout", "full"])
def test_resumed_bit_for_bit(base: str, tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"kind": kind, "validate": False}
    gpu: dict[str, Any] = {"accelerator": "gpu", "deterministic": True, "max_epochs": 1}
    try:
        whole = train(tmp_path / "whole", base, trainer=gpu, **settings)
        checkpoint = fitting.checkpoint(tmp_path / "whole", "rollout-step=2")
        again = train(tmp_path / "again", base, trainer=gpu, resume=str(checkpoint), **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(weights(whole), weights(again))
