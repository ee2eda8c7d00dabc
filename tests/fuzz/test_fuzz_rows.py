"""Whatever a data file holds, it is read, or refused by an error that names file and line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fuzz.fuzzing import fuzz, quick, texts
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_lambdapo.data import PRESETS, DataSource, PromptCollator, PromptTemplate, load_rows
from lightning_lambdapo.data.presets import text_of

TOKENIZER = tiny.tokenizer()
CHAT_TOKENIZER = tiny.tokenizer()
CHAT_TOKENIZER.chat_template = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
COLUMNS = sorted(
    {"prompt", "answer", "reference", "choices", "options", "prompt_id", "Correct Answer", "text", "role", "content"}
    | {f"Incorrect Answer {number}" for number in (1, 2, 3)}
    | {column for preset in PRESETS.values() for column in preset.columns.values()}
)

names = st.sampled_from(COLUMNS) | st.text(max_size=3)
short_texts = texts(6)
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([10**4299, -(10**18), 1e300, 5e-324, math.inf, -math.inf, math.nan, -0.0, 2**63])
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": short_texts})
    | st.dictionaries(st.sampled_from(["role", "content", "name"]), st.none() | short_texts | st.integers()),
    max_size=3,
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | short_texts | messages | st.lists(short_texts, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


def rows_of(preset: str | None) -> st.SearchStrategy[dict[str, Any]]:
    """Rows that have most of the columns that a preset reads, with anything in them."""
    used = {} if preset is None else dict.fromkeys([*PRESETS[preset].columns.values(), "options"], values | short_texts)
    others = {column: values for column in COLUMNS if column not in used}
    return st.fixed_dictionaries(used, optional=others)


presets_and_rows = st.sampled_from([None, *PRESETS]).flatmap(lambda name: st.tuples(st.just(name), rows_of(name)))
raw_lines = st.one_of(
    st.binary(max_size=40),
    texts(8).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [
            b"",
            b"[" * 100_000,
            b'{"prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
            b'{"prompt": ' + b'{"content": ' * 5_000,
            b'{"prompt": "a", "answer": 1' + b"0" * 5_000 + b"}",
            b'{"prompt": "a", "answer": -1e999}',
            b'{"prompt": "a", "answer": NaN}',
            b'{"prompt": "a", "answer": 1, "answer": -Infinity}',
            b'{"prompt": "a", "prompt": "b", "extra": NaN}',
            b'\xef\xbb\xbf{"prompt": "a"}',
            b'{"prompt": "a"}\r',
            b'{"prompt": "a\x00"}',
            b'{"prompt": "\\u0000\\ud83d\\ude00"}',
            b'{"prompt": "\\ud800"}',
            b'{"prompt": "\xed\xa0\x80"}',
            b'"prompt"',
        ]
    ),
)


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rows.jsonl"


def load(path: Path, content: bytes, preset: str | None = None) -> list[dict[str, Any]]:
    """The rows of a file; none where it is refused as it should be."""
    path.write_bytes(content)
    try:
        rows = load_rows(DataSource(path=str(path), preset=preset))
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError  # noqa: PT017 -- either outcome is right
        assert message.startswith((f"{path}, line ", f"The data source {path} has no rows"))
        assert len(message) < 3_000
        return []
    for row in rows:
        assert row.keys() >= {"prompt", "answer", "reference", "prompt_id"}
        assert all(row[name] is None or isinstance(row[name], str) for name in ("answer", "reference"))
        check_collation(row)
    assert [row["prompt_id"] for row in rows] == list(range(len(rows)))
    return rows


def check_collation(row: dict[str, Any]) -> None:
    """What was read can be worded, tokenized and collated; without an id its own hash is one."""
    try:
        batch = PromptCollator(TOKENIZER, max_prompt_length=10**6)([row, {**row, "prompt_id": None}])
    except ValueError as error:
        assert "has no tokens" in str(error)  # noqa: PT017 -- blank messages; either outcome is right
        return
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert batch.attention_mask.any(-1).all()
    assert int(batch.prompt_ids[0]) == row["prompt_id"]
    assert int(batch.prompt_ids[1]) >= 0
    assert batch.answers == [row["answer"]] * 2
    try:
        text = PromptTemplate().render(CHAT_TOKENIZER, row["prompt"])
    except ValueError as error:
        assert "chat template refuses" in str(error)  # noqa: PT017 -- either outcome is right
    else:
        assert isinstance(text, str)


@fuzz(150)
@given(st.lists(raw_lines, max_size=4), st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\x00\n"]), st.booleans())
def test_arbitrary_bytes(path: Path, lines: list[bytes], separator: bytes, finished: bool) -> None:
    load(path, separator.join(lines) + separator * finished)


@fuzz(200)
@given(st.lists(values, min_size=1, max_size=3))
def test_arbitrary_json(path: Path, rows: list[Any]) -> None:
    load(path, b"\n".join(json.dumps(row).encode() for row in rows))


@fuzz(250)
@given(presets_and_rows)
@example(("gpqa_diamond", {"Question": "q", "Explanation": "e"}))
@example(("sat_math", {"question": "q", "Answer": "A"}))
@example(("sat_math", {"question": None, "Answer": "A", "options": "A) 1"}))
@example(("mixture_of_thoughts", {"messages": 3}))
@example(("mixture_of_thoughts", {"messages": [{"content": "x"}, {"role": ["user"], "content": "y"}]}))
@example(("mmlu", {"question": 5, "choices": ["a", "b"], "answer": 1}))
@example((None, {"prompt": [{"role": "user", "content": None}]}))
@example((None, {"prompt": "a", "answer": math.nan}))
@example((None, {"prompt": "a", "answer": math.inf}))
def test_arbitrary_columns_of_every_preset(path: Path, chosen: tuple[str | None, dict[str, Any]]) -> None:
    preset, row = chosen
    load(path, json.dumps(row).encode(), preset)


@fuzz(150)
@given(
    st.lists(texts(6).filter(lambda text: text.strip() and not any(map(half, text))), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_good_files_are_read_as_they_are(
    path: Path, prompts: list[str], newline: str, finished: bool, mark: bool, ascii_only: bool
) -> None:
    lines = [json.dumps({"prompt": prompt, "answer": prompt}, ensure_ascii=ascii_only) for prompt in prompts]
    content = "\ufeff" * mark + newline.join(lines) + newline * finished
    rows = load(path, content.encode())
    assert [row["prompt"] for row in rows] == prompts
    assert [row["answer"] for row in rows] == [prompt.strip() for prompt in prompts]


def half(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "x": ' + b"[" * 50_000, r"line 2 is nested too deeply to be read\. Flatten it"),
        (b'{"prompt": "a", "answer": ' + b"9" * 4_301 + b"}", "line 2 holds a whole number of more than 4300 digits"),
        (b'{"prompt": "a", "answer": NaN}', "line 2 does not fit: .* text or a finite number, got nan"),
        (b'{"prompt": "a", "answer": 1e999}', "line 2 does not fit: .* text or a finite number, got inf"),
        (b'{"prompt": "a\\ud800"}', "line 2 does not fit: the prompt has half of a surrogate pair"),
        (b'{"prompt": [{"content": "a"}, {"content": "\\udfff"}]}', "line 2 does not fit: the prompt has half"),
        (b'{"prompt": [{"role": "user"}]}', "line 2 does not fit: the prompt must be a non-empty text or a list"),
        (
            b'{"prompt": "a", "choices": ["no", "yes"], "answer": true}',
            "line 2 does not fit: its answer True is neither an index",
        ),
        (
            b'{"prompt": "a", "choices": ["b", ["c"]], "answer": 0}',
            "line 2 does not fit: its choices must be a list of 2 to 10 texts",
        ),
    ],
)
def test_errors_say_what_and_where(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        load_rows(DataSource(path=str(path)))


@pytest.mark.parametrize(
    ("preset", "row", "message"),
    [
        (
            "gpqa_diamond",
            {"Question": "q", "Explanation": "e"},
            "its 'Correct Answer' must be a non-empty text, got None",
        ),
        ("sat_math", {"question": "q", "Answer": "A"}, "its 'options' must be a non-empty text, got None"),
        ("mixture_of_thoughts", {"messages": "hi"}, "its messages have no user and assistant turn"),
        (
            "multiple_choice",
            {"question": 1, "choices": ["a", "b"], "answer": 0},
            "its 'prompt' must be a non-empty text",
        ),
        ("gsm8k", {"question": "q", "answer": ["#### 1"]}, "its 'answer' must be a non-empty text"),
    ],
)
def test_presets_say_what_they_miss(path: Path, preset: str, row: dict[str, Any], message: str) -> None:
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"line 1 does not fit the preset {preset}: {message}"):
        load_rows(DataSource(path=str(path), preset=preset))


@pytest.mark.parametrize("name", ["a\0b", "~no-such-user-at-all/rows.jsonl", "\ud800", "/", "x" * 5_000])
def test_paths_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match=r"^The data file '.*' cannot be read: ") as caught:
        load_rows(DataSource(path=name))
    assert caught.type is ValueError


@fuzz(300)
@given(values | numbers)
@example(10**5000)
@example(1e308)
def test_answers_become_text_or_are_refused(value: Any) -> None:
    try:
        text = text_of(value)
    except ValueError as error:
        assert "an answer or reference" in str(error)  # noqa: PT017 -- either outcome is right
    else:
        assert text is None if value is None else text == text.strip()  # type: ignore[union-attr]
        if isinstance(value, float) and text is not None:
            assert float(text) == value


def test_annotations_are_removed_in_linear_time(path: Path) -> None:
    with quick("gsm8k"):
        load(path, json.dumps({"question": "q", "answer": "<<" * 80_000 + "\n#### 1"}).encode(), "gsm8k")


@fuzz(200)
@given(short_texts | messages | values, st.none() | short_texts, st.booleans())
def test_prompts_are_encoded_or_refused(prompt: Any, system: str | None, chat: bool) -> None:
    template = PromptTemplate(system=system, user="{prompt} {x}", chat=chat)
    collator = PromptCollator(CHAT_TOKENIZER, template)
    try:
        text, ids = collator.encode({"prompt": prompt})
    except ValueError as error:
        assert type(error) is ValueError  # noqa: PT017 -- either outcome is right
    else:
        assert ids
        assert not any(map(half, text))
        if isinstance(prompt, str):
            assert prompt in text


@fuzz(200)
@given(st.lists(texts(6).filter(lambda text: len(text) > 0), min_size=1, max_size=4))
def test_prompts_are_told_apart_by_their_texts(prompts: list[str]) -> None:
    collator = PromptCollator(TOKENIZER)
    try:
        ids = collator([{"prompt": prompt} for prompt in prompts]).prompt_ids
    except ValueError as error:
        assert any(map(half, "".join(prompts))) or "has no tokens" in str(error)  # noqa: PT017
        return
    assert ids.dtype == torch.int64
    assert (ids >= 0).all()
    assert len(set(ids.tolist())) == len(set(prompts))


@pytest.mark.parametrize(
    "given_id", [2**63, -(2**63) - 1, 10**5000, 1.5, "7", [1]], ids=["above", "below", "huge", "float", "text", "list"]
)
def test_ids_are_whole_numbers_of_64_bits(given_id: Any) -> None:
    with pytest.raises(ValueError, match="A `prompt_id` must be a whole number of 64 bits"):
        PromptCollator(TOKENIZER)([{"prompt": "a", "prompt_id": given_id}])
    batch = PromptCollator(TOKENIZER)([{"prompt": "a", "prompt_id": number} for number in (2**63 - 1, -(2**63))])
    assert batch.prompt_ids.tolist() == [2**63 - 1, -(2**63)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PromptCollator(TOKENIZER)([]), "There are no rows to collate"),
        (lambda: PromptCollator(TOKENIZER)([{"prompt": []}]), r"must be a text or a list of chat messages, got \[\]"),
        (
            lambda: PromptCollator(TOKENIZER)([{"prompt": "\ud800", "prompt_id": 7}]),
            r"\(id 7\) has half of a surrogate",
        ),
        (
            lambda: PromptTemplate().render(CHAT_TOKENIZER, [{"role": "tool", "content": "x"}]),
            "chat template refuses .*: no tool",
        ),
    ],
)
def test_collation_says_what_is_wrong(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
