from typing import Any, cast

import pytest
import tiny
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.packing import plan_micro_batches
from lightning_lambdapo.rollout import GroupedEngine, HFEngine, RolloutConfig, RolloutEngine, SamplingConfig
from lightning_lambdapo.rollout.sampling import row_uniforms
from lightning_lambdapo.scoring import CompletionScorer

ARCHITECTURES = ["llama", "qwen3", "gemma3", "phi3", "gpt2", "mistral"]
GREEDY = SamplingConfig(temperature=0.0)


def streams(batch: PromptBatch, group_size: int, length: int, **key: int) -> Tensor:
    settings = {"seed": 0, "step": 0} | key
    ids = batch.prompt_ids.tolist()
    return row_uniforms(
        stage="train", prompt_ids=ids, occurrences=[0] * len(ids), num_samples=group_size, length=length, **settings
    )


def run(
    engine: type[RolloutEngine],
    model: PreTrainedModel,
    batch: PromptBatch,
    *,
    group_size: int = 4,
    length: int = 24,
    sampling: SamplingConfig = SamplingConfig(),
    pad_is_eos: bool = False,
    eos_ids: tuple[int, ...] = (1,),
) -> Rollout:
    with torch.no_grad():
        return engine(tiny.tokenizer(pad_is_eos=pad_is_eos), eos_ids, 1 if pad_is_eos else 0).generate(
            model, batch, sampling=sampling, uniforms=streams(batch, group_size, length)
        )


def completions(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_grouped_equals_generate(architecture: str) -> None:
    model = tiny.model(architecture)
    batch = tiny.batch(tiny.ragged_prompts(6, seed=3))
    expected = cast(Any, model).generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        generation_config=GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=[1, 5], pad_token_id=0),
    )[:, batch.input_ids.shape[1] :]
    for engine in (GroupedEngine, HFEngine):
        found = run(engine, model, batch, group_size=1, sampling=GREEDY, eos_ids=(1, 5))
        for row, mask, want in zip(found.completion_ids, found.completion_mask, expected, strict=True):
            length = int(mask.sum())
            assert row[:length].tolist() == want[:length].tolist()
            assert length == 24 or int(want[length - 1]) in (1, 5)
    assert len({tuple(ids) for ids in completions(found)}) > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_engines_agree_in_float64(architecture: str) -> None:
    model = tiny.model(architecture, dtype=torch.float64)
    batch = tiny.batch(tiny.ragged_prompts(4))
    grouped, plain = (run(engine, model, batch) for engine in (GroupedEngine, HFEngine))
    assert completions(grouped) == completions(plain)
    assert torch.equal(grouped.truncated, plain.truncated)
    torch.testing.assert_close(grouped.sampling_logprobs, plain.sampling_logprobs, atol=1e-5, rtol=0, check_dtype=False)
    torch.testing.assert_close(grouped.entropy, plain.entropy, atol=1e-5, rtol=0, check_dtype=False)
    assert len({tuple(ids) for ids in completions(grouped)[:4]}) > 1  # a group's rows differ


def test_rows_do_not_depend_on_their_batch() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    prompts = tiny.ragged_prompts(5, seed=1)
    together = completions(run(GroupedEngine, model, tiny.batch(prompts)))
    alone = [
        ids
        for index, prompt in enumerate(prompts)
        for ids in completions(run(GroupedEngine, model, tiny.batch([prompt], prompt_ids=[index], extra=3)))
    ]
    assert together == alone


def test_streams_are_keyed_by_everything_but_the_batch() -> None:
    key = {"seed": 1, "stage": "train", "step": 2, "prompt_ids": [7], "occurrences": [0], "num_samples": 2, "length": 5}
    base = row_uniforms(**key)  # type: ignore[arg-type]
    assert base.shape == (2, 5)
    assert base.dtype == torch.float64
    assert ((base > 0) & (base <= 1)).all()
    assert not torch.equal(base[0], base[1])
    for name, value in {"seed": 2, "stage": "validate", "step": 3, "prompt_ids": [8], "occurrences": [1]}.items():
        assert not torch.isclose(base, row_uniforms(**(key | {name: value}))).any()  # type: ignore[arg-type]
    longer = row_uniforms(**(key | {"length": 9, "num_samples": 3}))  # type: ignore[arg-type]
    assert torch.equal(longer[:2, :5], base)
    other = row_uniforms(**(key | {"prompt_ids": [3, 7], "occurrences": [0, 0]}))  # type: ignore[arg-type]
    assert torch.equal(other[2:], base)


def test_streams_never_hold_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch draws from [0, 1); at 0 a first token of probability zero would be drawn."""
    monkeypatch.setattr(torch, "rand", lambda *_, out, **__: out.zero_())
    key = {"seed": 1, "stage": "train", "step": 2, "prompt_ids": [7], "occurrences": [0], "num_samples": 2, "length": 5}
    assert (row_uniforms(**key) == 1.0).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", [GroupedEngine, HFEngine])
def test_decoding_stops_with_its_last_row(engine: type[RolloutEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    calls = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    batch = tiny.batch(tiny.ragged_prompts(3))
    decoder = engine(tiny.tokenizer(), tuple(range(2, 49, 3)), 0)
    with torch.no_grad():  # the first call also probes
        decoder.generate(model, batch, sampling=GREEDY, uniforms=streams(batch, 1, 2))
        calls.clear()
        rollout = decoder.generate(model, batch, sampling=SamplingConfig(), uniforms=streams(batch, 4, 110))
    assert 1 < len(calls) == int(rollout.lengths.max()) < 100


@pytest.mark.parametrize("engine", [GroupedEngine, HFEngine])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_sampling_logprobs_are_scoring_logprobs(
    engine: type[RolloutEngine], architecture: str, pad_is_eos: bool
) -> None:
    model = tiny.model(architecture)
    batch = tiny.batch(tiny.ragged_prompts(4), pad_id=1 if pad_is_eos else 0, extra=2)
    rollout = run(engine, model, batch, sampling=SamplingConfig(temperature=0.7), pad_is_eos=pad_is_eos)
    scorer = CompletionScorer(model, temperature=0.7, chunk_size=7)
    for micro_batch in plan_micro_batches(batch, rollout, torch.arange(16), max_tokens=120):
        scored = scorer(micro_batch)
        sampled = rollout.sampling_logprobs[micro_batch.rows, : scored.shape[1]]
        torch.testing.assert_close(scored, sampled, atol=1e-4, rtol=0)
    # And both are log_softmax(logits / temperature) of one unpadded row.
    ids = completions(rollout)[5]
    prompt = batch.input_ids[1][batch.attention_mask[1]].tolist()
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.double() / 0.7, -1)
    chosen = expected[torch.arange(len(ids)), ids]
    torch.testing.assert_close(rollout.sampling_logprobs[5, : len(ids)].double(), chosen, atol=1e-4, rtol=0)
    entropy = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(rollout.entropy[5, : len(ids)].double(), entropy, atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", [GroupedEngine, HFEngine])
def test_every_end_id_stops_a_row_and_pad_may_be_one(engine: type[RolloutEngine]) -> None:
    model = tiny.model("llama")
    batch = tiny.batch(tiny.ragged_prompts(4), pad_id=1)
    eos_ids = (1, 9, 13, 21)
    rollout = run(engine, model, batch, pad_is_eos=True, eos_ids=eos_ids, length=40)
    ends = set()
    for ids, truncated in zip(completions(rollout), rollout.truncated.tolist(), strict=True):
        assert not set(ids[:-1]) & set(eos_ids)
        assert truncated == (ids[-1] not in eos_ids)
        assert len(ids) == 40 or not truncated
        ends.add(ids[-1])
    assert len(ends & set(eos_ids)) > 1
    padding = ~rollout.completion_mask
    assert (rollout.completion_ids[padding] == 1).all()
    assert not rollout.sampling_logprobs[padding].any()


def test_texts_are_decoded_without_the_end() -> None:
    rollout = run(GroupedEngine, tiny.model(), tiny.batch(tiny.ragged_prompts(2)))
    for text, ids in zip(rollout.texts, completions(rollout), strict=True):
        assert text == "".join(tiny.LETTERS[i - 3] for i in ids if i > 2)


def test_the_models_generation_config_has_no_say() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    batch = tiny.batch(tiny.ragged_prompts(3))
    expected = completions(run(HFEngine, model, batch))
    defaults = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=5.0, max_length=5, eos_token_id=[4, 5]
    )
    model.generation_config = defaults
    assert completions(run(HFEngine, model, batch)) == expected
    assert completions(run(GroupedEngine, model, batch)) == expected
    assert model.generation_config is defaults


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "`group_size` must be at least 2, got 1; a pairwise advantage needs a peer"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"sampling": GREEDY}, "temperature` is 0"),
    ],
)
def test_bad_rollout_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**settings)  # type: ignore[arg-type]
