"""Named column mappings of public datasets, as plain data and small pure functions."""

import hashlib
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning_lambdapo.rewards.verifier.extraction import marked_answer

Fields = dict[str, Any]
_LETTERS = "ABCDEFGHIJ"

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(ValueError):
    """A row that a preset cannot read. The caller adds its file and line, or dataset and row."""


def _as_is(fields: Fields, row: Mapping[str, Any]) -> Fields:
    choices = fields.get("choices")
    some = choices.get("text") if isinstance(choices, Mapping) else choices
    return fields if some is None or some == [] else _choices(fields, row)


@dataclass(frozen=True, slots=True)
class Preset:
    """How a public dataset becomes prompts, answers and references.

    Attributes:
        dataset: hub id. None for a mapping of the user's own data.
        config: configuration name on the hub.
        split: the training split where the dataset is trained on, else the split that papers report.
        columns: our names -> the dataset's column names.
        subjects: columns to break evaluations down by. The first that is in the data becomes ``subject``.
        finish: turns the mapped columns (and the whole row) into ``prompt``, ``answer`` and ``reference``.
    """

    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    subjects: tuple[str, ...] = ("subject",)
    finish: Callable[[Fields, Mapping[str, Any]], Fields] = _as_is


def text_of(value: object) -> str | None:
    """An answer as text: whole floats lose their point, None stays None.

    Example:
        >>> text_of(14.0), text_of(" x "), text_of(None)
        ('14', 'x', None)
    """
    if value is None:
        return None
    if isinstance(value, bool | str):
        return str(value).strip()
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"an answer or reference must be text or a finite number, got {value}")
    if isinstance(value, int | float):
        try:
            return str(int(value)) if value == int(value) else str(value)
        except ValueError as error:  # Python prints no integer of more than 4300 digits
            raise RowError("an answer or reference is a number with thousands of digits. Write it as text") from error
    raise RowError(f"an answer or reference must be text or a number, got {reprlib.repr(value)}")


def is_chat(value: object) -> bool:
    """Whether a value is a list of chat messages with text as content, and as role where there is one.

    Example:
        >>> is_chat([{"role": "user", "content": "1+1"}]), is_chat([]), is_chat([{"content": None}])
        (True, False, False)
    """
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, dict) and isinstance(item.get("content"), str) and isinstance(item.get("role", ""), str)
            for item in value
        )
    )


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"its {name!r} must be a non-empty text, got {reprlib.repr(value)}")
    return value


def _gsm8k(fields: Fields, row: Mapping[str, Any]) -> Fields:
    solution = _text(fields, "answer")
    if "####" not in solution:
        raise RowError(f"its solution has no final line '#### answer': {solution[-60:]!r}")
    return {
        "prompt": fields["prompt"],
        "answer": solution.rpartition("####")[2].replace(",", "").strip(),
        "reference": re.sub(r"<<[^<>\n]*>>", "", solution),
    }


def _boxed_solution(fields: Fields, row: Mapping[str, Any]) -> Fields:
    answer = marked_answer(_text(fields, "reference"), "boxed")
    if answer is None:
        raise RowError("its solution has no \\boxed{...}")
    return fields | {"answer": answer}


def _chat(fields: Fields, row: Mapping[str, Any]) -> Fields:
    messages = fields["prompt"]
    texts = {message.get("role"): message["content"] for message in reversed(messages if is_chat(messages) else [])}
    if not {"user", "assistant"} <= texts.keys():
        raise RowError("its messages have no user and assistant turn")
    solution = texts["assistant"]
    return {"prompt": texts["user"], "answer": marked_answer(solution, "boxed"), "reference": solution}


def _choices(fields: Fields, row: Mapping[str, Any], *, by_index: bool = False) -> Fields:
    """A question with choices. The answer is a letter, the text or value of a choice, or an index from 0.

    A number is the index where choices are texts, and the value where they are numbers themselves, unless the dataset
    is known to have indices (``by_index``).
    """
    choices, answer = fields["choices"], fields.get("answer")
    if isinstance(choices, Mapping):  # {"text": [...], "label": [...]}
        choices = choices.get("text")
    plain = isinstance(choices, list) and all(isinstance(choice, str | int | float) for choice in choices)
    if not plain or not 2 <= len(choices) <= len(_LETTERS):
        raise RowError(f"its choices must be a list of 2 to {len(_LETTERS)} texts, got {reprlib.repr(choices)}")
    indexed = by_index or not all(map(_is_number, choices))
    places: list[Any] = [*range(len(choices))] if indexed and _is_number(answer) else []
    if answer in places:
        letter = _LETTERS[places.index(answer)]
    elif isinstance(answer, str) and answer.strip("() ") in tuple(_LETTERS[: len(choices)]):
        letter = answer.strip("() ")
    elif (not indexed or isinstance(answer, str)) and text_of(answer) in (texts := list(map(text_of, choices))):
        letter = _LETTERS[texts.index(text_of(answer))]
    else:
        hint = "" if indexed else f" (where choices are numbers, as {reprlib.repr(choices)} are, a number is no index)"
        raise RowError(
            f"its answer {reprlib.repr(answer)} is neither an index, a letter nor the text of a choice{hint}"
        )
    return fields | {"prompt": _question(_text(fields, "prompt"), choices), "answer": letter}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _gpqa(fields: Fields, row: Mapping[str, Any]) -> Fields:
    right = _text(row, "Correct Answer")
    choices = [right, *(_text(row, f"Incorrect Answer {number}") for number in (1, 2, 3))]
    # A fixed order that depends only on question and choice, not on a random state.
    question = _text(fields, "prompt")
    choices.sort(key=lambda choice: hashlib.blake2b(f"{question}\0{choice}".encode("utf-8", "surrogatepass")).digest())
    return fields | {
        "prompt": _question(question, [choice.strip() for choice in choices]),
        "answer": _LETTERS[choices.index(right)],
    }


def _lettered_options(fields: Fields, row: Mapping[str, Any]) -> Fields:
    return fields | {"prompt": f"{_text(fields, 'prompt')}\n{_text(row, 'options')}"}


def _question(question: str, choices: list[Any]) -> str:
    return "\n".join(
        [question.strip(), *(f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False))]
    )


_COMPETITION = {"prompt": "problem", "answer": "answer", "reference": "solution"}

PRESETS: dict[str, Preset] = {
    "gsm8k": Preset("openai/gsm8k", "main", "train", {"prompt": "question", "answer": "answer"}, finish=_gsm8k),
    "math": Preset(
        "DigitalLearningGmbH/MATH-lighteval",
        "default",
        "train",
        {"prompt": "problem", "reference": "solution"},
        ("type",),
        _boxed_solution,
    ),
    "math500": Preset("HuggingFaceH4/MATH-500", None, "test", _COMPETITION),
    "aime24": Preset("HuggingFaceH4/aime_2024", None, "train", _COMPETITION),
    "aime25": Preset("math-ai/aime25", None, "test", {"prompt": "problem", "answer": "answer"}),
    "amc23": Preset("math-ai/amc23", None, "test", {"prompt": "question", "answer": "answer"}),
    "gpqa_diamond": Preset(
        "Idavidrein/gpqa",
        "gpqa_diamond",
        "train",
        {"prompt": "Question", "reference": "Explanation"},
        ("High-level domain",),
        _gpqa,
    ),
    "mmlu": Preset(
        "cais/mmlu",
        "all",
        "test",
        {"prompt": "question", "choices": "choices", "answer": "answer"},
        ("subject", "type"),
        partial(_choices, by_index=True),
    ),
    "multiple_choice": Preset(
        columns={"prompt": "question", "choices": "choices", "answer": "answer"},
        subjects=("subject", "type"),
        finish=_choices,
    ),
    "mixture_of_thoughts": Preset("open-r1/Mixture-of-Thoughts", "math", "train", {"prompt": "messages"}, finish=_chat),
    "mawps": Preset(columns={"prompt": "input", "answer": "target"}),
    "sat_math": Preset(columns={"prompt": "question", "answer": "Answer"}, finish=_lettered_options),
}
