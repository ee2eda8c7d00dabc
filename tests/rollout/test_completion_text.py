"""What rewards see of special tokens, and what ends a completion beside the end-of-sequence token."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from decoding import ARCHITECTURES, streams
from small import Rows, module, trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lightning_lambdapo import AdapterConfig, EvaluationConfig, LambdaPOModule, PromptTemplate, RolloutConfig
from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.policy.loading import check_vocabulary
from lightning_lambdapo.rewards import AccuracyReward, FormatReward, LengthPenalty, Reward, RewardInputs
from lightning_lambdapo.rewards.semantic_density import SemanticDensityReward
from lightning_lambdapo.rollout import GroupedEngine, HFEngine, RolloutEngine, grouped
from lightning_lambdapo.rollout.completion_text import CompletionText
from lightning_lambdapo.runs.model_card import generation_settings

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
END, TOOL = "<|im_end|>", "<|tool|>"
THINK, UNTHINK, ANSWER, UNANSWER, IM_END, IM_TOOL = range(49, 55)
ENGINES: list[type[RolloutEngine]] = [GroupedEngine, HFEngine]
CHAT = "{% for m in messages %}({{ m.role }}){{ m.content }}<|im_end|>{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and tags, an end of turn and a tool as special tokens."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": [*TAGS, END, TOOL]})
    return made


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny random Llama whose tokenizer has tags as special tokens."""
    directory = tmp_path_factory.mktemp("tagged")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny.config("llama", vocab_size=55)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


class Seen(Reward):
    """Remembers what it is given; it says nothing about special tokens."""

    def __init__(self) -> None:
        super().__init__(name="seen")
        self.texts: list[str] = []

    def __call__(self, inputs: RewardInputs) -> Sequence[float]:
        self.texts += inputs.completions
        return [float(len(text)) for text in inputs.completions]


def prepared(base: str, rewards: list[Any], **rollout: Any) -> LambdaPOModule:
    model = module(base, rewards=rewards, rollout=RolloutConfig(group_size=4, max_new_tokens=8, **rollout))
    model.configure_model()
    return model


IDS = [THINK, 3, UNTHINK, ANSWER, 30, UNANSWER, IM_TOOL, IM_END, 1]  # a and 1 between the tags


@pytest.mark.parametrize("engine", ["grouped", "hf"])
@pytest.mark.parametrize(
    ("rewards", "keep", "text"),
    [
        ([FormatReward(style="think_answer")], None, "<think>a</think><answer>1</answer>"),
        ([FormatReward(style="tag")], None, "a<answer>1</answer>"),
        ([FormatReward(pattern=r"<\|tool\|>$")], None, "<think>a</think><answer>1</answer><|tool|>"),
        ([FormatReward(), LengthPenalty(9, 3)], None, "a1"),
        ([AccuracyReward()], None, "a<answer>1</answer>"),
        ([SemanticDensityReward()], None, "a<answer>1"),
        ([Seen()], None, "<think>a</think><answer>1</answer>"),
        ([lambda: None], None, "<think>a</think><answer>1</answer>"),
        ([Seen()], False, "a1"),
        ([FormatReward(style="think_answer")], False, "a1"),
        ([FormatReward()], True, "<think>a</think><answer>1</answer><|tool|><|im_end|>"),
    ],
)
def test_special_tokens_that_rewards_see(
    tagged: str, rewards: list[Any], keep: bool | None, text: str, engine: Any
) -> None:
    def judge(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    found = [reward if isinstance(reward, Reward) else judge for reward in rewards]
    model = prepared(tagged, found, keep_special_tokens=keep, engine=engine)
    zeros = torch.zeros(1, len(IDS) + 1)
    rollout = model.engine.finish(torch.tensor([[*IDS, 0]]), zeros, zeros)
    assert rollout.texts == [text]
    assert int(rollout.lengths) == len(IDS)


def test_the_format_is_rewarded(tagged: str) -> None:
    reward = FormatReward(style="think_answer")
    texts = prepared(tagged, [reward]).engine.finish(torch.tensor([[*IDS[:-3], 1]]), *torch.zeros(2, 1, 7)).texts
    assert reward(RewardInputs(["?"], texts, [None], [None], [7], [False], [{}])) == [1.0]


@pytest.mark.parametrize("engine", ["grouped", "hf"])
def test_every_stage_sees_them(tagged: str, tmp_path: Path, engine: Any) -> None:
    seen = Seen()
    model = module(
        tagged,
        rewards=[seen],
        rollout=RolloutConfig(group_size=4, max_new_tokens=24, engine=engine),
        validation=EvaluationConfig(sampling=SamplingConfig(temperature=1.0)),
    )
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1, limit_test_batches=1, limit_predict_batches=1)
    for stage in (run.fit, run.validate, run.test):
        seen.texts = []
        cast(Any, stage)(model, Rows(batch_size=8))
        assert any(re.search("</?(think|answer)>", text) for text in seen.texts)
        assert not any(TOOL in text or "<eos>" in text or "<pad>" in text for text in seen.texts)
    [records] = cast(Any, run.predict(model, Rows(batch_size=8)))
    assert any(re.search("</?(think|answer)>", record["completion"]) for record in records)


def test_without_kept_tokens_text_is_as_before() -> None:
    text = CompletionText(tokenizer())
    assert text.decode(IDS) == str(tokenizer().decode(IDS, skip_special_tokens=True)) == "a1"


# -- stop strings and stop tokens -----------------------------------------------------------------------------------


def run(
    engine: type[RolloutEngine],
    model: PreTrainedModel,
    batch: PromptBatch,
    *,
    stops: Sequence[str] = (),
    eos_ids: tuple[int, ...] = (1,),
    length: int = 24,
    **options: Any,
) -> Rollout:
    made = engine(tiny.tokenizer(), eos_ids, 0, **options)
    made.text = CompletionText(tiny.tokenizer(), stop_strings=stops)
    with torch.no_grad():
        return made.generate(model, batch, sampling=SamplingConfig(), uniforms=streams(batch, 4, length))


def cut(rollout: Rollout, stops: Sequence[str]) -> list[tuple[list[int], bool]]:
    """Each row through the character that completes a stop string, and whether it is truncated: by a loop."""
    decode = tiny.tokenizer().decode
    rows = []
    for ids, mask, truncated in zip(rollout.completion_ids, rollout.completion_mask, rollout.truncated, strict=True):
        row = ids[mask].tolist()
        ends = [end for end in range(1, len(row) + 1) if any(stop in decode(row[:end]) for stop in stops)]
        rows.append((row[: ends[0]], False) if ends else (row, bool(truncated)))
    return rows


def rows_of(rollout: Rollout) -> list[tuple[list[int], bool]]:
    return cut(rollout, [])


def pairs_of(rollout: Rollout, count: int) -> list[str]:
    """Two characters that follow each other in some completions."""
    texts = [text for text in rollout.texts if len(text) > 12]
    return [text[7:9] for text in texts[:count]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (HFEngine, {}),
        (GroupedEngine, {}),
        (GroupedEngine, {"poll_every": 7}),
        (GroupedEngine, {"poll_every": 100}),
        (GroupedEngine, {"config": RolloutConfig(max_live_tokens=260)}),
    ],
)
def test_a_completion_ends_at_the_token_that_completes_a_stop_string(
    architecture: str, engine: type[RolloutEngine], options: dict[str, Any]
) -> None:
    model = tiny.model(architecture, dtype=torch.float64)
    batch = tiny.batch(tiny.ragged_prompts(4))
    whole = run(GroupedEngine, model, batch)
    stops = [*pairs_of(whole, 4), "<eos>"]
    found = run(engine, model, batch, stops=stops, **options)
    expected = cut(whole, stops)
    assert rows_of(found) == expected
    assert sum(len(row) for row, _ in expected) < int(whole.lengths.sum())
    assert found.texts == [tiny.tokenizer().decode(row, skip_special_tokens=True) for row, _ in expected]
    # Log-probabilities and entropies are those of the tokens that are left, and nothing follows them.
    for kept, same in ((found.sampling_logprobs, whole.sampling_logprobs), (found.entropy, whole.entropy)):
        assert kept is not None
        assert same is not None
        width = kept.shape[1]
        left = torch.where(found.completion_mask, same[:, :width], torch.zeros_like(same[:, :width]))
        torch.testing.assert_close(kept, left, atol=1e-5, rtol=0, check_dtype=False)
    assert found.completion_ids.masked_fill(found.completion_mask, 0).eq(0).all()


def test_the_engine_that_takes_over_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "difference", lambda *_: "made up")
    model, batch = tiny.model("llama", dtype=torch.float64), tiny.batch(tiny.ragged_prompts(4))
    whole = run(HFEngine, model, batch)
    with pytest.warns(match="cannot be decoded by the grouped engine"):
        found = run(GroupedEngine, model, batch, stops=pairs_of(whole, 4))
    assert rows_of(found) == cut(whole, pairs_of(whole, 4)) != rows_of(whole)


def test_a_stop_string_may_be_a_special_token_that_rewards_do_not_see() -> None:
    made = GroupedEngine(tokenizer(), (1,), 0)
    made.text = CompletionText(tokenizer(), stop_strings=[END])
    rollout = made.finish(torch.tensor([[3, IM_END, 4, 5], [3, 4, 5, 6]]), *torch.ones(2, 2, 4))
    assert rollout.texts == ["a", "abcd"]
    assert rollout.lengths.tolist() == [2, 4]
    assert rollout.truncated.tolist() == [False, True]
    assert rollout.sampling_logprobs.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_stop_strings_are_looked_for_at_polls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.model("llama"), tiny.batch(tiny.ragged_prompts(4))
    polls: list[int] = []
    monkeypatch.setattr(GroupedEngine, "_stop", lambda *seen: polls.append(seen[-1]))
    run(GroupedEngine, model, batch, stops=["ab"], poll_every=8, eos_ids=(48,))
    assert polls == [8] * 4  # before the first token, then after 8, 16 and 24 of them


def test_rows_that_stop_make_room() -> None:
    """Not only is the text cut off: such rows are no longer decoded."""
    model, batch = tiny.model("llama"), tiny.batch(tiny.ragged_prompts(4))
    steps: list[int] = []

    class Counting(GroupedEngine):
        def _stop(self, live: Any, new: int) -> None:
            super()._stop(live, new)
            steps.append(int(live.alive.sum()))

    letters = [letter for letter in tiny.LETTERS if letter != "a"]
    run(Counting, model, batch, stops=letters, eos_ids=(48,))
    assert steps[1] <= 4  # nearly every first token is one of them
    assert len(steps) < 24


def test_long_characters_that_several_tokens_make() -> None:
    class Bytes:
        """One token per byte, as byte-level tokenizers decode."""

        def __init__(self) -> None:
            self.added_tokens_decoder: dict[int, Any] = {}
            self.all_special_ids: list[int] = []
            self.all_special_tokens: list[str] = []

        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", "replace")

    text = CompletionText(cast(Any, Bytes()), stop_strings=["é!"])
    ids = list("aé?é!b".encode())
    assert text.length(ids) == len("aé?é!".encode())
    assert [text.stops(ids[:end], 1) for end in range(1, len(ids))] == [False] * 6 + [True]
    assert text.length(list(b"abc")) is None
    assert text.length([]) is None


@pytest.mark.parametrize("engine", ["grouped", "hf"])
def test_stop_tokens_end_completions_in_every_stage(tagged: str, tmp_path: Path, engine: Any) -> None:
    stops = [IM_END, *range(3, 30)]
    model = module(
        tagged,
        rewards=[Seen()],
        rollout=RolloutConfig(
            group_size=4, max_new_tokens=24, engine=engine, stop_token_ids=stops, stop_strings=["0", "</think>"]
        ),
        validation=EvaluationConfig(sampling=SamplingConfig(temperature=1.0)),
    )
    run = trainer(tmp_path, limit_train_batches=1, limit_predict_batches=1)
    run.fit(model, Rows(batch_size=8))
    [records] = cast(Any, run.predict(model, Rows(batch_size=8)))
    assert not any(re.search("[a-z].|0.|</think>.", re.sub("</?(think|answer)>", "", r["completion"])) for r in records)
    assert max(record["completion_length"] for record in records) < 24
    assert not any(record["truncated"] for record in records)
    exported = generation_settings(model.policy, model.tokenizer, model.hparams)
    assert exported.eos_token_id == sorted([1, *stops])


def test_a_stop_token_that_is_a_tag_is_seen(tagged: str) -> None:
    for keep in (None, True):
        model = prepared(tagged, [Seen()], stop_token_ids=[UNANSWER, IM_END], keep_special_tokens=keep)
        assert model.engine.eos_ids == (1, UNANSWER, IM_END)
        ids = torch.tensor([[ANSWER, 30, UNANSWER, 4], [ANSWER, 30, IM_END, 4]])
        assert model.engine.finish(ids, *torch.zeros(2, 2, 4)).texts == ["<answer>1</answer>", "<answer>1"]


# -- what is wrong before a rollout ---------------------------------------------------------------------------------


def with_chat(tagged: str, directory: Path, template: str) -> str:
    AutoModelForCausalLM.from_pretrained(tagged).save_pretrained(directory)
    made = tokenizer()
    made.chat_template = template
    made.save_pretrained(directory)
    return str(directory)


def test_a_turn_that_does_not_end_the_completion_is_warned_of(tagged: str, tmp_path: Path) -> None:
    base = with_chat(tagged, tmp_path, CHAT)
    with pytest.warns(match=r"ends a turn with '<\|im_end\|>' \(token 53\).*Set `rollout.stop_token_ids: \[53\]`"):
        prepared(base, [Seen()])
    prepared(base, [Seen()], stop_token_ids=[IM_END])
    prepared(base, [Seen()], stop_strings=[END])


def test_prompts_that_are_plain_end_no_turn(tagged: str, tmp_path: Path) -> None:
    base = with_chat(tagged, tmp_path, CHAT)
    run = trainer(tmp_path, limit_train_batches=1)
    run.fit(module(base, rewards=[Seen()]), Rows(batch_size=4, template=PromptTemplate(chat=False)))
    with pytest.warns(match="ends a turn with"):
        trainer(tmp_path, limit_train_batches=1).fit(module(base, rewards=[Seen()]), Rows(batch_size=4))


@pytest.mark.parametrize(
    "target",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "options": {"modules_to_save": ["embed_tokens"]}},
        {"target_modules": ["q_proj"], "options": {"trainable_token_indices": [3, 4]}},
    ],
)
def test_embeddings_under_an_adapter_are_counted(tagged: str, target: dict[str, Any]) -> None:
    model = module(tagged, lora=AdapterConfig(r=2, **target), rewards=[Seen()])
    model.configure_model()
    with pytest.raises(ValueError, match="has 99, and the model's tokens are 0 to 54"):
        check_vocabulary(model.causal_lm, model.tokenizer, [99])


@pytest.mark.parametrize(
    "template", [CHAT.replace(END, "<eos>"), CHAT.replace(END, "\n"), "{{ raise_exception('no') }}"]
)
def test_a_turn_that_ends_otherwise_is_not(tagged: str, tmp_path: Path, template: str) -> None:
    prepared(with_chat(tagged, tmp_path, template), [Seen()])


def test_a_tokenizer_beyond_the_embedding_is_refused(base: str, tagged: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"6 tokens that the model has no embedding for: '<think>' has the id 49, .*48"
    ):
        prepared(str(tmp_path), [Seen()])
    with pytest.raises(ValueError, match=r"`rollout.stop_token_ids` has 99, and the model's tokens are 0 to 54"):
        prepared(tagged, [Seen()], stop_token_ids=[99])
    with pytest.raises(ValueError, match=r"`rollout.stop_strings` has an empty text"):
        RolloutConfig(stop_strings=["a", ""])


def test_tokens_that_transformers_adds_unasked_do_not_count(base: str) -> None:
    model, made = AutoModelForCausalLM.from_pretrained(base), tiny.tokenizer()
    made.add_special_tokens({"unk_token": "<unknown>"})
    made.add_tokens("<|endoftext|>", special_tokens=True)
    check_vocabulary(model, made, [])
    made.add_special_tokens({"pad_token": "<|endoftext|>"})
    with pytest.raises(ValueError, match=r"1 tokens .*'<\|endoftext\|>' has the id 50"):
        check_vocabulary(model, made, [])


def test_the_learning_pass_sees_the_same_tokens(tagged: str, tmp_path: Path) -> None:
    """On the first update the ratio is 1 on every token, the last ones included."""
    model = module(
        tagged,
        rewards=[Seen()],
        rollout=RolloutConfig(group_size=4, max_new_tokens=24, stop_strings=["a", "b", "1"]),
    )
    run = trainer(tmp_path, limit_train_batches=2)
    run.fit(model, Rows(batch_size=8))
    logged: dict[str, Tensor] = run.callback_metrics
    assert float(logged["train/truncated"]) < 1
    assert float(logged["train/ratio_max"]) == pytest.approx(1.0, abs=1e-4)
    assert float(logged["train/sampling_drift"]) < 1e-4
