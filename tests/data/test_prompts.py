from typing import Any

import pytest
import tiny
import torch

from lightning_lambdapo.data import PromptCollator, PromptTemplate

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if quiet %}(quiet){% endif %}"
)


def chat_tokenizer() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def text_of(tokenizer: Any, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids))


def test_plain_prompts_hold_braces() -> None:
    template = PromptTemplate(user="q: {prompt} a:")
    assert template.render(tiny.tokenizer(), "{x} of {prompt}") == "q: {x} of {prompt} a:"
    template = PromptTemplate(system="be brief", user="q: {prompt}")
    assert template.render(tiny.tokenizer(), "1+1") == "be brief\n\nq: 1+1"


def test_chat_templates_are_used_where_there_are_any() -> None:
    template = PromptTemplate(system="be brief", chat_kwargs={"quiet": True})
    assert template.render(chat_tokenizer(), "1+1") == "<system>be brief<user>1+1<assistant>(quiet)"
    assert PromptTemplate(chat=False).render(chat_tokenizer(), "1+1") == "1+1"
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "1+1"}]
    assert template.render(chat_tokenizer(), messages) == "<system>own<user>1+1<assistant>(quiet)"
    with pytest.raises(ValueError, match=r"`template\.chat` is true and the tokenizer has no chat template"):
        PromptTemplate(chat=True).render(tiny.tokenizer(), "1+1")
    with pytest.raises(ValueError, match=r"must contain \{prompt\}, got 'q:'"):
        PromptTemplate(user="q:")


def test_special_tokens_are_neither_doubled_nor_left_at_the_end() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", 1)]
    )
    template = PromptTemplate()
    assert template.encode(tokenizer, "ab") == [2, 3, 4]
    tokenizer.chat_template = CHAT
    assert template.encode(tokenizer, "ab") == [3, 4]


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_last_message_of_the_assistant_is_continued() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TURNS
    question = {"role": "user", "content": "1+1"}
    begun = [question, {"role": "assistant", "content": "it is "}]
    assert PromptTemplate().render(tokenizer, begun) == "<user>1+1<end><assistant>it is "
    assert PromptTemplate(system="be brief").render(tokenizer, begun) == (
        "<system>be brief<end><user>1+1<end><assistant>it is "
    )
    assert PromptTemplate(chat=False).render(tokenizer, begun) == "1+1\n\nit is "
    # Nothing is begun.
    for content in ("", " "):
        empty = [question, {"role": "assistant", "content": content}]
        assert PromptTemplate().render(tokenizer, empty) == "<user>1+1<end><assistant>"
    another = PromptTemplate(chat_kwargs={"add_generation_prompt": True})
    assert another.render(tokenizer, begun) == "<user>1+1<end><assistant>it is <end><assistant>"


def test_text_that_begins_with_the_first_token_gets_no_second() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    template = PromptTemplate()
    assert template.encode(tokenizer, "ab") == [bos, 3, 4]
    assert template.encode(tokenizer, "<bos>ab") == [bos, 3, 4]
    assert template.encode(tokenizer, "a<bos>") == [bos, 3, bos]


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_batches_are_left_padded_and_hold_every_column(pad_is_eos: bool) -> None:
    tokenizer = tiny.tokenizer(pad_is_eos=pad_is_eos)
    collator = PromptCollator(tokenizer, max_prompt_length=5)
    rows: list[dict[str, Any]] = [
        {"prompt": "1+1", "answer": "2", "reference": "r", "prompt_id": 7, "level": 3},
        {"prompt": "12+11", "shade": "dark"},
    ]
    batch = collator(rows)
    assert batch.input_ids.shape == (2, 5)
    assert batch.input_ids[0, :2].tolist() == [1 if pad_is_eos else 0] * 2
    assert batch.attention_mask.tolist() == [[False, False, True, True, True], [True] * 5]
    assert batch.attention_mask.dtype == torch.bool
    assert text_of(tokenizer, batch.input_ids[0][batch.attention_mask[0]]) == "1+1"
    assert batch.prompts == ["1+1", "12+11"]
    assert (batch.answers, batch.references) == (["2", None], ["r", None])
    assert batch.columns == [{"level": 3}, {"shade": "dark"}]
    assert batch.prompt_ids[0] == 7
    assert 0 <= int(batch.prompt_ids[1]) < 2**63
    again = collator([{"prompt": "12+11"}, {"prompt": "12+12"}])
    assert again.prompt_ids[0] == batch.prompt_ids[1] != again.prompt_ids[1]


def test_a_padding_token_inside_a_prompt_counts() -> None:
    batch = PromptCollator(tiny.tokenizer(pad_is_eos=True))([{"prompt": "a<eos>b"}, {"prompt": "abcde"}])
    assert batch.input_ids[0].tolist() == [1, 1, 3, 1, 4]
    assert batch.attention_mask[0].tolist() == [False, False, True, True, True]


def test_bad_rows_are_errors() -> None:
    collator = PromptCollator(tiny.tokenizer(), max_prompt_length=5)
    with pytest.raises(ValueError, match=r"id 3 has 6 tokens, more than max_prompt_length = 5"):
        collator([{"prompt": "123456", "prompt_id": 3}])
    with pytest.raises(ValueError, match=r"has no 'prompt'\. It has 'question'"):
        collator([{"question": "1"}])
    with pytest.raises(ValueError, match="has no tokens"):
        collator([{"prompt": ""}])
    answers: list[Any] = [["6", "six"], {"a": 1}, (6,), float("nan")]
    for answer in answers:
        for field in ("answer", "reference"):
            with pytest.raises(
                ValueError, match=r"The row with the prompt '1': an answer or reference must be text or a"
            ):
                collator([{"prompt": "1", field: answer}])


def test_answers_become_text() -> None:
    collator = PromptCollator(tiny.tokenizer())
    answers: list[Any] = [6, 6.0, 0.5, " six ", None]
    batch = collator([{"prompt": "1", "answer": answer, "reference": answer} for answer in answers])
    assert batch.answers == batch.references == ["6", "6", "0.5", "six", None]


def test_a_prompt_has_to_fit() -> None:
    with pytest.raises(ValueError, match="`max_prompt_length` must be at least 1, got 0"):
        PromptCollator(tiny.tokenizer(), max_prompt_length=0)
