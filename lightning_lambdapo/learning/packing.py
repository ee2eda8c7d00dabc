"""Micro-batches of the learning pass: rows of a rollout under a token budget, packed or padded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.policy.attention import PackedRow


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model together.

    Attributes:
        rows: ``(n,)`` int64, their indices among the ``N`` rows of the rollout.
        input_ids: ``(b, l)`` int64: one packed row of prompts and completions that share them, or ``n`` padded rows.
        position_ids: ``(b, l)`` int64, 0 at the first token of each prompt.
        attention_mask: ``(b, l)`` bool, False on padding.
        completion_mask: ``(n, T')`` bool, the ``M`` tokens whose log-probability counts.
        predictors: ``(M,)`` int64 in row-major order, index among the ``b * l`` of the token that predicts each.
        targets: ``(M,)`` int64, the tokens themselves.
        branches: who attends to whom in a packed row. None if rows are padded.
    """

    rows: Tensor
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    predictors: Tensor
    targets: Tensor
    branches: PackedRow | None = None

    def release(self) -> None:
        """Free the attention masks of a packed row, when its last pass is over."""
        if self.branches is not None:
            self.branches.release()

    @classmethod
    def padded(cls, batch: PromptBatch, rollout: Rollout, rows: Tensor) -> Self:
        """One input row per completion: the left-padded prompt, then the right-padded completion."""
        prompts = rows // (len(rollout.completion_ids) // len(batch.input_ids))
        prompt_mask = batch.attention_mask[prompts].bool()
        completion_mask = rollout.completion_mask[rows]
        prompt_width, width = int(prompt_mask.sum(-1).max()), int(completion_mask.sum(-1).max())
        completion_mask = completion_mask[:, :width]
        attention_mask = torch.cat([prompt_mask[:, -prompt_width:], completion_mask], dim=-1)
        completion_ids = rollout.completion_ids[rows, :width]
        row, column = completion_mask.nonzero(as_tuple=True)
        return cls(
            rows=rows,
            input_ids=torch.cat([batch.input_ids[prompts, -prompt_width:], completion_ids], dim=-1),
            position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0),
            attention_mask=attention_mask,
            completion_mask=completion_mask,
            predictors=row * attention_mask.shape[1] + prompt_width + column - 1,
            targets=completion_ids[completion_mask],
        )

    @classmethod
    def packed(cls, batch: PromptBatch, rollout: Rollout, rows: Tensor) -> Self:
        """All in one unpadded row, each prompt once. ``rows`` of one prompt must follow each other.

        A completion's last token predicts nothing and is omitted from the input.
        """
        device = rows.device
        group_size = len(rollout.completion_ids) // len(batch.input_ids)
        ids: list[Tensor] = []
        predictors: list[Tensor] = []
        prompts: list[int] = []
        completions: list[list[int]] = []
        offset, end, current = 0, 0, -1
        for row, length in zip(rows.tolist(), rollout.lengths[rows].tolist(), strict=True):
            if row // group_size != current:
                current = row // group_size
                ids.append(batch.input_ids[current][batch.attention_mask[current].bool()])
                prompts.append(len(ids[-1]))
                completions.append([])
                offset += prompts[-1]
                end = offset - 1
            ids.append(rollout.completion_ids[row, : length - 1])
            predictors += [torch.tensor([end]), torch.arange(offset, offset + length - 1)]
            completions[-1] += [length - 1] if length > 1 else []
            offset += length - 1
        branches = PackedRow(prompts, completions, device)
        input_ids = torch.cat(ids)[None]
        completion_mask = rollout.completion_mask[rows]
        completion_mask = completion_mask[:, : int(completion_mask.sum(-1).max())]
        return cls(
            rows=rows,
            input_ids=input_ids,
            position_ids=branches.position_ids,
            attention_mask=torch.ones_like(input_ids, dtype=torch.bool),
            completion_mask=completion_mask,
            predictors=torch.cat(predictors).to(device),
            targets=rollout.completion_ids[rows, : completion_mask.shape[1]][completion_mask],
            branches=branches,
        )

    @classmethod
    def of_tokens(cls, input_ids: Tensor, *, packed: bool = False) -> Self:
        """``(1, l)`` tokens without a prompt, of which all but the first count."""
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return cls(
            rows=places[:1],
            input_ids=input_ids,
            position_ids=places[None],
            attention_mask=mask,
            completion_mask=mask[:, 1:],
            predictors=places[:-1],
            targets=input_ids[0, 1:],
            branches=PackedRow([input_ids.shape[1]], [[]], input_ids.device) if packed else None,
        )


def plan_micro_batches(
    batch: PromptBatch, rollout: Rollout, rows: Tensor, *, max_tokens: int, share_prompts: bool = True
) -> list[MicroBatch]:
    """Split ``rows`` into micro-batches of at most ``max_tokens`` tokens of the model's input.

    With ``share_prompts`` the rows of a prompt go together in one packed row. It is divided only if it is over the
    budget, and small groups share one. Otherwise rows of similar length are padded together, and padding counts. The
    largest come first, so that a batch too large for memory fails at once. A single row longer than the budget is a
    micro-batch of its own.

    Args:
        batch: the prompts, ``(B, P)``.
        rollout: their completions, ``(N, T)``.
        rows: ``(n,)`` int64 ascending, the rows to split.
        max_tokens: budget of one micro-batch.
        share_prompts: one packed row per micro-batch, or padded rows.
    """
    group_size = len(rollout.completion_ids) // len(batch.input_ids)
    prompt_lengths = batch.attention_mask.sum(-1).tolist()
    lengths = rollout.lengths.tolist()
    chosen = rows.tolist()
    prompts = {row: int(prompt_lengths[row // group_size]) for row in chosen}
    if share_prompts:
        bins, build = _pack(chosen, prompts, lengths, group_size, max_tokens), MicroBatch.packed
    else:
        bins, build = _pad(chosen, prompts, lengths, max_tokens), MicroBatch.padded
    return [build(batch, rollout, torch.tensor(members, device=rows.device)) for members in bins]


def _pad(rows: list[int], prompts: dict[int, int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of rows of similar length, whose padded size is within the budget."""
    bins: list[list[int]] = []
    prompt_width = width = 0
    for row in sorted(rows, key=lambda row: -prompts[row] - lengths[row]):
        wider = max(prompt_width, prompts[row]), max(width, lengths[row])
        if bins and (len(bins[-1]) + 1) * sum(wider) <= budget:
            bins[-1].append(row)
        else:
            bins.append([row])
            wider = prompts[row], lengths[row]
        prompt_width, width = wider
    return bins


def _pack(
    rows: list[int], prompts: dict[int, int], lengths: Sequence[int], group_size: int, budget: int
) -> list[list[int]]:
    """Bins of groups, or of parts of groups over the budget. Each prompt counts once per bin."""
    pieces: list[tuple[int, list[int]]] = []
    current = -1
    for row in rows:
        size, members = pieces[-1] if row // group_size == current else (prompts[row], [])
        if not members or size + lengths[row] - 1 > budget:
            current = row // group_size
            pieces.append((prompts[row] + lengths[row] - 1, [row]))
        else:
            pieces[-1] = size + lengths[row] - 1, [*members, row]
    bins: list[tuple[int, list[int]]] = []
    for size, members in sorted(pieces, key=lambda piece: -piece[0]):
        for index, (used, others) in enumerate(bins):
            if used + size <= budget and others[-1] // group_size != members[0] // group_size:
                bins[index] = used + size, others + members
                break
        else:
            bins.append((size, members))
    return [members for _, members in sorted(bins, key=lambda part: -part[0])]
