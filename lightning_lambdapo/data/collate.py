"""From rows to a left-padded batch of prompts."""

import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_lambdapo.data.presets import LONE_SURROGATE, RowError, text_of
from lightning_lambdapo.data.templates import PromptTemplate
from lightning_lambdapo.datatypes import ROW_FIELDS, PromptBatch


class PromptCollator:
    """``collate_fn`` of a DataLoader whose rows are mappings.

    A row has ``prompt`` (text or chat messages), and may have ``answer``, ``reference`` (text, a number or None) and
    ``prompt_id`` (a stable whole number, by default a 63-bit hash of the prompt's text). All other keys
    reach the rewards as columns.

    Args:
        tokenizer: the policy's.
        template: how a prompt is worded.
        max_prompt_length: longest prompt, in tokens. A longer one is an error, never truncated.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate = PromptTemplate(),
        max_prompt_length: int = 512,
    ) -> None:
        if max_prompt_length < 1:
            raise ValueError(f"`max_prompt_length` must be at least 1, got {max_prompt_length}.")
        self.tokenizer = tokenizer
        self.template = template
        self.max_prompt_length = max_prompt_length

    def encode(self, row: Mapping[str, Any]) -> tuple[str, list[int]]:
        """Text and token ids of a row's prompt.

        Raises:
            ValueError: the row has no prompt, or one that cannot be worded or tokenized, or has no tokens.
        """
        if "prompt" not in row:
            raise ValueError(f"A row has no 'prompt'. It has {', '.join(map(repr, row))}.")
        text = self.template.render(self.tokenizer, row["prompt"])
        if LONE_SURROGATE.search(text):
            raise ValueError(
                f"The prompt {text!r} (id {row.get('prompt_id')}) has half of a surrogate pair (\\ud800 to \\udfff), "
                "which no tokenizer accepts."
            )
        ids = self.template.encode(self.tokenizer, text)
        if not ids:
            raise ValueError(f"The prompt {text!r} (id {row.get('prompt_id')}) has no tokens.")
        return text, ids

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PromptBatch:
        """Collate rows.

        Raises:
            ValueError: as :meth:`encode`, there is no row, a prompt is longer than ``max_prompt_length``, or a
                ``prompt_id`` is not a whole number of 64 bits, or an answer or reference is no text and no number.
        """
        if not rows:
            raise ValueError("There are no rows to collate.")
        texts, encoded = zip(*(self.encode(row) for row in rows), strict=True)
        for row, ids in zip(rows, encoded, strict=True):
            if len(ids) > self.max_prompt_length:
                raise ValueError(
                    f"The prompt with id {row.get('prompt_id')} has {len(ids)} tokens, more than max_prompt_length = "
                    f"{self.max_prompt_length}. Raise it, or drop the row (LambdaPODataModule drops and counts them)."
                )
        width = max(map(len, encoded))
        pad_id = self.tokenizer.pad_token_id or 0
        prompt_ids = [_prompt_id(row, text) for row, text in zip(rows, texts, strict=True)]
        return PromptBatch(
            input_ids=torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in encoded]),
            # From lengths, because the padding id may be a token of the prompt.
            attention_mask=torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in encoded]),
            prompt_ids=torch.tensor(prompt_ids, dtype=torch.int64),
            prompts=list(texts),
            answers=[_text(row, "answer") for row in rows],
            references=[_text(row, "reference") for row in rows],
            columns=[{name: value for name, value in row.items() if name not in ROW_FIELDS} for row in rows],
        )


def _text(row: Mapping[str, Any], field: str) -> str | None:
    try:
        return text_of(row.get(field))
    except RowError as error:
        raise ValueError(f"The row with the prompt {row['prompt']!r:.80}: {error}. A row has one answer.") from error


def _prompt_id(row: Mapping[str, Any], text: str) -> int:
    given = row.get("prompt_id")
    if given is None:
        return _hash(text)
    try:
        number = operator.index(given)
    except TypeError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"A `prompt_id` must be a whole number of 64 bits, and that of {text!r:.80} is not. Omit it.")
    return number


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
