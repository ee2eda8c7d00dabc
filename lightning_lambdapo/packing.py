"""Micro-batches of the learning pass: rows of like length under a token budget, trimmed to what they hold."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lightning_lambdapo.datatypes import PromptBatch, Rollout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model together: left-padded prompts, then right-padded completions.

    Attributes:
        rows: ``(n,)`` int64, which of the ``N`` rows of the rollout they are.
        input_ids: ``(n, P' + T')`` int64.
        attention_mask: ``(n, P' + T')`` bool.
        position_ids: ``(n, P' + T')`` int64, 0 at each row's first real token.
        completion_mask: ``(n, T')`` bool, the positions whose log-probability counts.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_mask: Tensor

    @classmethod
    def build(cls, batch: PromptBatch, rollout: Rollout, rows: Tensor) -> Self:
        """Gather ``rows`` of a rollout, padded no further than they need."""
        prompts = rows // (len(rollout.completion_ids) // len(batch.input_ids))
        prompt_mask = batch.attention_mask[prompts].bool()
        completion_mask = rollout.completion_mask[rows]
        prompt_width, width = int(prompt_mask.sum(-1).max()), int(completion_mask.sum(-1).max())
        attention_mask = torch.cat([prompt_mask[:, -prompt_width:], completion_mask[:, :width]], dim=-1)
        return cls(
            rows=rows,
            input_ids=torch.cat(
                [batch.input_ids[prompts, -prompt_width:], rollout.completion_ids[rows, :width]], dim=-1
            ),
            attention_mask=attention_mask,
            position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0),
            completion_mask=completion_mask[:, :width],
        )


def plan_micro_batches(batch: PromptBatch, rollout: Rollout, rows: Tensor, *, max_tokens: int) -> list[MicroBatch]:
    """Split ``rows`` into micro-batches of at most ``max_tokens`` tokens, padding included.

    The longest rows come first, so that what does not fit in memory fails at once. A single row longer than the budget
    goes alone.

    Args:
        batch: the prompts, ``(B, P)``.
        rollout: their completions, ``(N, T)``.
        rows: ``(n,)`` int64, the rows that are to be scored.
        max_tokens: budget of one micro-batch.
    """
    group_size = len(rollout.completion_ids) // len(batch.input_ids)
    prompt_lengths = batch.attention_mask.sum(-1).cpu()[rows.cpu() // group_size]
    lengths = rollout.lengths.cpu()[rows.cpu()]
    order = (prompt_lengths + lengths).argsort(descending=True, stable=True).tolist()
    bins: list[list[int]] = []
    prompt_width = width = 0
    for index in order:
        wider = max(prompt_width, int(prompt_lengths[index])), max(width, int(lengths[index]))
        if bins and (len(bins[-1]) + 1) * sum(wider) <= max_tokens:
            bins[-1].append(index)
        else:
            bins.append([index])
            wider = int(prompt_lengths[index]), int(lengths[index])
        prompt_width, width = wider
    return [MicroBatch.build(batch, rollout, rows[torch.tensor(chosen, device=rows.device)]) for chosen in bins]
