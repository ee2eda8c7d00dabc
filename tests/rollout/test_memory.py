"""Rollouts that run out of memory are sampled again, the same, with fewer tokens at once."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fitting import completions, metrics, train, wrap
from ranks import on_ranks, succeed
from small import Digits, finite_fit, module
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from lightning_lambdapo.config import RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.distributed import parallel
from lightning_lambdapo.rollout import GroupedEngine, HFEngine, RolloutEngine
from lightning_lambdapo.rollout.memory import LiveTokens
from lightning_lambdapo.rollout.sampling import row_uniforms

GROUP, LENGTH = 3, 6
PROMPTS = tiny.ragged_prompts(5, seed=2)


def scarce(model: PreTrainedModel, rows: int) -> list[int]:
    """Make the model run out of memory when it decodes more than ``rows`` rows. Returns the numbers of rows decoded."""
    decoded: list[int] = []
    forward = model.forward

    def limited(*arguments: Any, **inputs: Any) -> Any:
        count, width = inputs["input_ids"].shape
        if width == 1:
            decoded.append(count)
            if count > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*arguments, **inputs)

    model.forward = limited
    return decoded


def engine(kind: str, **settings: Any) -> RolloutEngine:
    if kind == "hf":
        return HFEngine(tiny.tokenizer(), (1, 5), 2)
    return GroupedEngine(tiny.tokenizer(), (1, 5), 2, RolloutConfig(**settings))


def case() -> tuple[PromptBatch, Tensor]:
    uniforms = row_uniforms(
        seed=0,
        stage="train",
        step=0,
        prompt_ids=list(range(5)),
        occurrences=[0] * 5,
        num_samples=GROUP,
        length=LENGTH,
    )
    return tiny.batch(PROMPTS), uniforms


def sample(live: LiveTokens, used: RolloutEngine, model: PreTrainedModel) -> Rollout:
    batch, uniforms = case()
    with torch.no_grad():
        return live.generate(used, model, batch, sampling=SamplingConfig(), uniforms=uniforms)


@pytest.mark.parametrize("kind", ["grouped", "hf", "fallen back"])
def test_the_same_tokens_are_drawn_with_half_the_tokens(kind: str) -> None:
    model = tiny.model("llama", dtype=torch.float64)
    expected = sample(LiveTokens(), engine("grouped" if kind == "grouped" else "hf"), model)
    used = engine("hf" if kind == "hf" else "grouped")
    if kind == "fallen back":
        used._probed, used._fallback = True, engine("hf")  # type: ignore[attr-defined]
    sample(LiveTokens(), used, model)  # the grouped engine's probe
    decoded = scarce(model, rows=2 * GROUP)
    live = LiveTokens()
    with pytest.warns(UserWarning, match=r"A rollout ran out of memory\. From now on at most") as warned:
        found = sample(live, used, model)
    total = sum(map(len, PROMPTS)) + 5 * GROUP * LENGTH
    assert len(warned) == live.retries <= 2
    assert live.limit is not None
    assert live.limit >= total // 4 - max(map(len, PROMPTS)) - GROUP * LENGTH
    for name in ("completion_ids", "completion_mask", "truncated"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    tolerance = 1e-10 if kind == "grouped" else 1e-6  # `generate` rounds logits to float32
    torch.testing.assert_close(found.sampling_logprobs, expected.sampling_logprobs, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=tolerance)
    assert found.texts == expected.texts
    decoded.clear()
    sample(live, used, model)  # the limit stays, without another warning
    assert max(decoded) <= 2 * GROUP


@pytest.mark.parametrize("kind", ["grouped", "hf"])
@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.filterwarnings("ignore:A rollout ran out of memory")
def test_a_group_that_does_not_fit_alone(kind: str, limit: int | None) -> None:
    model = tiny.model("llama")
    used, live = engine(kind, max_live_tokens=limit), LiveTokens(limit)
    sample(live, used, model)  # the grouped engine's probe
    scarce(model, rows=GROUP - 1)
    longest = max(map(len, PROMPTS)) + GROUP * LENGTH
    with pytest.raises(
        torch.OutOfMemoryError,
        match=f"The 3 completions of a single prompt .* up to {longest} tokens. Lower `max_new_tokens` .now 6., or "
        "`rollout.group_size` in training and `validation.num_samples` elsewhere. CUDA out of memory",
    ):
        sample(live, used, model)
    assert live.retries <= 3
    assert live.retries == 0 or (kind, limit) != ("grouped", 1), "one prompt at a time was asked for"


@pytest.mark.filterwarnings("ignore:A rollout ran out of memory")
def test_retries_are_logged_and_training_is_the_same(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finite_fit(tmp_path, module(base))
    forward = LlamaForCausalLM.forward

    def limited(self: Any, *arguments: Any, **inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] == 1 and len(inputs["input_ids"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *arguments, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)
    steps = finite_fit(tmp_path, module(base))
    for found, step in zip(steps, expected, strict=True):
        assert step.pop("train/rollout_memory_retries") == 0
        assert found.pop("train/rollout_memory_retries") == steps[0].get("train/rollout_memory_retries", 1) == 1
        assert found == pytest.approx(step, rel=1e-4, abs=1e-5)


def train_scarcely(directory: Path, base: str, **options: Any) -> None:
    """A run whose rank 1 is short of memory for all but the engine's probe."""
    forward, probing = LlamaForCausalLM.forward, [False]

    def probe(original: Any, *arguments: Any) -> None:
        probing[0] = True
        original(*arguments)
        probing[0] = False

    def limited(self: Any, *arguments: Any, **inputs: Any) -> Any:
        count, width = inputs["input_ids"].shape
        if parallel.rank() == 1 and width == 1 and count > 4 and not probing[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *arguments, **inputs)

    wrap(GroupedEngine, "_probe", probe)
    LlamaForCausalLM.forward = limited  # type: ignore[method-assign]
    train(directory, base, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "kind"), [("ddp", "grouped"), ("fsdp", "grouped"), ("fsdp", "hf")])
def test_one_rank_that_is_short_of_memory_samples_again_alone(base: str, tmp_path: Path, how: str, kind: Any) -> None:
    options: dict[str, Any] = {"how": how, "kind": "lora64", "validate": False, "rewards": [Digits()]}
    options["rollout"] = RolloutConfig(engine=kind, group_size=4, max_new_tokens=8)
    options["trainer"] = {"max_epochs": 1}
    for name, function in (("ample", train), ("scarce", train_scarcely)):
        succeed(on_ranks(2, function, tmp_path / name, base, logs=tmp_path / f"{name}-logs", **options))
    assert metrics(tmp_path / "scarce")[3, "train/rollout_memory_retries"] == 1
    assert metrics(tmp_path / "ample")[3, "train/rollout_memory_retries"] == 0
    first, second = completions(tmp_path / "ample"), completions(tmp_path / "scarce")
    assert [record["completion"] for record in first] == [record["completion"] for record in second]


def test_memory_that_ends_in_the_probe_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine does not fall back. It probes again in the next call."""
    model = tiny.model("llama")
    engine = GroupedEngine(tiny.tokenizer(), (1,), 0)
    batch = tiny.batch(tiny.ragged_prompts(2))
    options: dict[str, Any] = {"sampling": SamplingConfig(), "uniforms": torch.full((4, 4), 0.5, dtype=torch.float64)}
    decode = engine._decode

    def scarce(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(engine, "_decode", scarce)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="none left"):
        engine.generate(model, batch, **options)
    monkeypatch.setattr(engine, "_decode", decode)
    with torch.no_grad():
        assert engine.generate(model, batch, **options).completion_ids.shape[0] == 4
    assert engine._fallback is None
