from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from decoding import ARCHITECTURES, SWITCHES, streams
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lightning_lambdapo.config import PerformanceConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.learning.packing import plan_micro_batches
from lightning_lambdapo.learning.scoring import CompletionScorer
from lightning_lambdapo.policy.decoding import decoding_weights
from lightning_lambdapo.rollout import GroupedEngine, HFEngine, RolloutEngine, sampling
from lightning_lambdapo.rollout.kv_store import GroupStore
from lightning_lambdapo.rollout.sampling import row_uniforms

GREEDY = SamplingConfig(temperature=0.0)


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


@pytest.mark.parametrize(("bits", "uniform"), [(0, 1.0), (2**64 - 1, 2.0**-53)])
def test_streams_never_hold_a_zero(monkeypatch: pytest.MonkeyPatch, bits: int, uniform: float) -> None:
    """At 0 a first token of probability zero would be drawn."""
    monkeypatch.setattr(sampling, "random_bits", lambda count, *_: np.full(count, bits, dtype=np.uint64))
    key = {"seed": 1, "stage": "train", "step": 2, "prompt_ids": [7], "occurrences": [0], "num_samples": 2, "length": 5}
    assert (row_uniforms(**key) == uniform).all()  # type: ignore[arg-type]


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
    assert rollout.entropy is not None
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
        ({"group_size": 1}, "`group_size` must be at least 2, got 1, because a pairwise advantage needs a peer"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"max_live_tokens": 0}, "`max_live_tokens` must be at least 1, got 0"),
        ({"reserve_prompts": -1}, "`reserve_prompts` must be at least 0, got -1"),
        ({"sampling": GREEDY}, "temperature` is 0"),
    ],
)
def test_bad_rollout_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("switch", list(SWITCHES)[1:])
def test_no_switch_changes_a_token(architecture: str, switch: str) -> None:
    """In float64: sampled tokens, log-probabilities and entropies of every row, whatever it was decoded with."""
    model = tiny.model(architecture, dtype=torch.float64)
    batch = tiny.batch(tiny.ragged_prompts(5, seed=2), extra=1)
    expected = run(GroupedEngine, model, batch, eos_ids=(1, 7, 20))
    engine = partial(GroupedEngine, **tiny.configured(**SWITCHES[switch]))
    found = run(cast(Any, engine), model, batch, eos_ids=(1, 7, 20))
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.completion_mask, expected.completion_mask)
    torch.testing.assert_close(found.sampling_logprobs, expected.sampling_logprobs, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-6)
    lengths = expected.lengths
    assert lengths.unique().numel() > 4
    assert (lengths < 24).any()


class Watched:
    """A tiny model whose forwards are counted in tokens, and whose store's rows are noted step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.model = tiny.model("llama")
        self.batch = tiny.batch(tiny.ragged_prompts(6, seed=4))
        self.prefilled: list[int] = []
        self.decoded: list[int] = []
        self.live: list[tuple[int, int, int]] = []  # rows, distinct lengths, tokens they may come to
        forward, begin = self.model.forward, GroupStore.begin_step
        engine = GroupedEngine(tiny.tokenizer(), (1, 7, 20), 0, **tiny.configured(**config))
        arguments: dict[str, Any] = {"sampling": SamplingConfig(), "uniforms": streams(self.batch, 4, 24)}
        with torch.no_grad():
            engine.generate(self.model, self.batch, **arguments)  # also probes

            def counted(*args: Any, **kwargs: Any) -> Any:
                rows, length = kwargs["input_ids"].shape
                decoding = isinstance(kwargs["logits_to_keep"], int)
                (self.decoded if decoding else self.prefilled).append(rows * length)
                return forward(*args, **kwargs)

            def noted(store: GroupStore) -> None:
                tokens = int(store.prompt_lengths.sum()) + 24 * len(store)
                self.live.append((len(store), store.lengths.unique().numel(), tokens))
                begin(store)

            monkeypatch.setattr(self.model, "forward", counted)
            monkeypatch.setattr(GroupStore, "begin_step", noted)
            self.rollout = engine.generate(self.model, self.batch, **arguments)


def test_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt token once, each completion token but the last once, in as many steps as the longest row has."""
    watched = Watched(monkeypatch)
    prompts = int(watched.batch.attention_mask.sum())
    assert watched.prefilled == [prompts]
    assert sum(watched.decoded) == int((watched.rollout.lengths - 1).sum())
    assert len(watched.decoded) == int(watched.rollout.lengths.max()) - 1
    monkeypatch.undo()
    apart = Watched(monkeypatch, share_prompts_in_rollouts=False, compaction=False)
    assert apart.prefilled == [4 * prompts]
    assert sum(apart.decoded) == 24 * (int(apart.rollout.lengths.max()) - 1)


def test_prompts_come_in_as_rows_end_and_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Watched(monkeypatch)
    monkeypatch.undo()
    budget = 240
    watched = Watched(monkeypatch, max_live_tokens=budget)
    assert sum(watched.prefilled) == int(watched.batch.attention_mask.sum())
    assert len(watched.prefilled) > 2
    assert max(tokens for _, _, tokens in watched.live) <= budget
    assert max(distinct for _, distinct, _ in watched.live) > 1  # new rows beside older ones
    assert sum(watched.decoded) == sum(whole.decoded)
    one_by_one = sum(int(lengths.max()) - 1 for lengths in watched.rollout.lengths.view(6, 4))
    assert len(whole.decoded) < len(watched.decoded) < one_by_one


def test_an_architecture_it_cannot_decode_goes_to_generate_with_one_warning() -> None:
    model = tiny.model("qwen3", dtype=torch.float64)
    batch = tiny.batch(tiny.ragged_prompts(3))
    expected = run(HFEngine, model, batch)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    engine = GroupedEngine(tiny.tokenizer(), (1,), 0)
    arguments: dict[str, Any] = {"sampling": SamplingConfig(), "uniforms": streams(batch, 4, 24)}

    def generate() -> Rollout:
        with torch.no_grad():
            return engine.generate(model, batch, **arguments)

    engine._fallback = None
    with pytest.warns(UserWarning, match="cannot be decoded by the grouped engine .layers of type chunked_attention"):
        engine._probe(model)
    model.config.layer_types = ["full_attention", "full_attention"]
    assert completions(generate()) == completions(expected)  # and without another warning


def test_the_probe_sees_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    attend = GroupStore.attend

    def wrong(self: GroupStore, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attend(self, query * 1.5, *args, **kwargs)

    monkeypatch.setattr(GroupStore, "attend", wrong)
    batch = tiny.batch(tiny.ragged_prompts(3))
    with pytest.warns(UserWarning, match="log-probabilities differ by"):
        found = run(GroupedEngine, model, batch)
    assert completions(found) == completions(run(HFEngine, model, batch))


def test_the_probe_leaves_no_trace() -> None:
    model = tiny.model("llama")
    engine = GroupedEngine(tiny.tokenizer(), (1,), 0)
    state = torch.get_rng_state()
    engine._probe(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.eos_ids == (1,)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_merging_changes_no_token_and_no_weight(options: dict[str, Any]) -> None:
    policy = tiny.adapted(dtype=torch.float64, scale=1.0, **options)
    model = cast(PreTrainedModel, policy.get_base_model())
    batch = tiny.batch(tiny.ragged_prompts(4))
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    merged, apart = (
        run(cast(Any, partial(GroupedEngine, **tiny.configured(merge_adapter=merge))), model, batch)
        for merge in (True, False)
    )
    assert torch.equal(merged.completion_ids, apart.completion_ids)
    with policy.disable_adapter():
        assert not torch.equal(run(GroupedEngine, model, batch).completion_ids, apart.completion_ids)
    with decoding_weights(model, PerformanceConfig(merge_adapter=True)):
        layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
        assert all(layer.merged for layer in layers)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert not any(layer.merged for layer in layers)
