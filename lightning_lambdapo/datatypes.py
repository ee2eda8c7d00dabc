"""The values that travel through one training step.

Notation of all docstrings of the package: ``B`` prompts on a rank, ``G`` rollouts per prompt (the group),
``N = B * G`` rows in group-major order (row ``n`` belongs to prompt ``n // G``), ``P`` the prompt length (left-padded),
``T`` the completion length (right-padded).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lambdapo.functional.losses import LossOutput

__all__ = ["LossOutput", "PromptBatch", "RewardOutcome", "Rollout", "Scores"]

_ROLLOUT_TENSORS = ("completion_ids", "completion_mask", "sampling_logprobs", "entropy", "truncated")


class PromptBatch(NamedTuple):
    """One batch of prompts from the DataLoader. It is a tuple, so that Lightning can move it between devices.

    Attributes:
        input_ids: ``(B, P)`` int64, left-padded prompt tokens.
        attention_mask: ``(B, P)`` bool, True on prompt tokens.
        prompt_ids: ``(B,)`` int64, stable identity of each prompt, and key of its sampling streams.
        prompts: ``B`` prompt texts, as given to the tokenizer.
        answers: ``B`` final answers, None where the data has none.
        references: ``B`` reference solutions, None where the data has none.
        columns: ``B`` mappings of all other columns of the data, for the rewards.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_ids: Tensor
    prompts: list[str]
    answers: list[str | None]
    references: list[str | None]
    columns: list[dict[str, Any]]

    def select(self, indices: Sequence[int]) -> "PromptBatch":
        """These prompts, in this order."""
        index = list(indices)
        return PromptBatch._make(
            field[index] if isinstance(field, Tensor) else [field[place] for place in index] for field in self
        )

    def join(self, other: "PromptBatch") -> "PromptBatch":
        """These prompts, followed by the other's, which must be padded to the same width."""
        pairs: Iterable[tuple[Any, Any]] = zip(self, other, strict=True)
        return PromptBatch._make(
            torch.cat([mine, theirs]) if isinstance(mine, Tensor) else mine + theirs for mine, theirs in pairs
        )


#: Keys of a data row that are no columns.
ROW_FIELDS = ("prompt", "answer", "reference", "prompt_id")


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions sampled from the policy for one batch of prompts.

    Attributes:
        completion_ids: ``(N, T)`` int64, right-padded.
        completion_mask: ``(N, T)`` bool, True from the first token through the first end-of-sequence token, or
            the token that completes a stop string.
        sampling_logprobs: ``(N, T)`` float, log-probability of each sampled token, ``log_softmax(logits /
            temperature)`` before top-k, top-p, min-p and repetition penalty. 0 where masked out.
        entropy: ``(N, T)`` float, entropy in nats of the same distribution. 0 where masked out. None if the engine does
            not compute it.
        truncated: ``(N,)`` bool, True where nothing ended the completion before ``max_new_tokens``.
        texts: ``N`` completions, decoded without the special tokens that ``rollout.keep_special_tokens`` strips.
    """

    completion_ids: Tensor
    completion_mask: Tensor
    sampling_logprobs: Tensor
    entropy: Tensor | None
    truncated: Tensor
    texts: list[str]

    @property
    def lengths(self) -> Tensor:
        """Completion lengths in tokens, the end-of-sequence token included: ``(N,)`` int64."""
        return self.completion_mask.sum(-1)

    @property
    def finite(self) -> Tensor:
        """True for rows whose log-probabilities are all finite, so that sampling was valid. ``(N,)`` bool."""
        return self.sampling_logprobs.isfinite().all(-1)

    def select(self, rows: Sequence[int]) -> "Rollout":
        """These rows, in this order."""
        index = list(rows)
        values = {name: getattr(self, name) for name in _ROLLOUT_TENSORS}
        tensors: dict[str, Any] = {name: None if value is None else value[index] for name, value in values.items()}
        return Rollout(**tensors, texts=[self.texts[row] for row in rows])

    def join(self, other: "Rollout") -> "Rollout":
        """These rows, followed by the other's. The shorter ones are padded with token 0, which is masked out."""
        width = max(self.completion_ids.shape[1], other.completion_ids.shape[1])
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _ROLLOUT_TENSORS}
        tensors: dict[str, Any] = {
            name: None if any(part is None for part in pair) else torch.cat([_widen(part, width) for part in pair])
            for name, pair in pairs.items()
        }
        return Rollout(**tensors, texts=[*self.texts, *other.texts])

    def records(self, batch: PromptBatch, *, columns: bool = False) -> list[dict[str, Any]]:
        """One plain mapping per completion, in row order, for JSONL files and tables.

        Args:
            batch: the prompts.
            columns: include the reference and, in one mapping, all other columns of the data.
        """
        samples = len(self.texts) // len(batch.prompts)
        owners = range(len(batch.prompts))
        extra = [{"reference": batch.references[i], "columns": batch.columns[i]} if columns else {} for i in owners]
        return [
            {
                "prompt_id": int(batch.prompt_ids[row // samples]),
                "sample": row % samples,
                "prompt": batch.prompts[row // samples],
                "completion": text,
                "completion_length": length,
                "truncated": truncated,
                "answer": batch.answers[row // samples],
                **extra[row // samples],
            }
            for row, (text, length, truncated) in enumerate(
                zip(self.texts, self.lengths.tolist(), self.truncated.tolist(), strict=True)
            )
        ]


@dataclass(frozen=True, slots=True)
class RewardOutcome:
    """The rewards of one rollout.

    Attributes:
        total: ``(B, G)`` float32, the sum of weight times part over the applicable parts. 0 where invalid.
        parts: each reward's own value before its weight, ``(B, G)`` float32 by name. NaN where it is not applicable.
        valid: ``(B, G)`` bool, False where the row has no usable total.
    """

    total: Tensor
    parts: dict[str, Tensor]
    valid: Tensor

    def select(self, groups: Sequence[int]) -> "RewardOutcome":
        """These groups, in this order."""
        index = list(groups)
        parts = {name: part[index] for name, part in self.parts.items()}
        return RewardOutcome(self.total[index], parts, self.valid[index])

    def join(self, other: "RewardOutcome") -> "RewardOutcome":
        """These groups, followed by the other's."""
        parts = {name: torch.cat([part, other.parts[name]]) for name, part in self.parts.items()}
        return RewardOutcome(torch.cat([self.total, other.total]), parts, torch.cat([self.valid, other.valid]))


Scores = RewardOutcome  #: its name in release 0.1


def _widen(values: Tensor, width: int) -> Tensor:
    """Pad ``(N, T)`` with zeros to ``(N, width)``. ``(N,)`` stays as it is."""
    return values if values.ndim == 1 else torch.nn.functional.pad(values, (0, width - values.shape[1]))
