"""Mini-batches of a rollout: one optimizer update each, with the counts of the whole global mini-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lambdapo.config import AlgorithmConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.distributed.parallel import gather_objects, rank, world_size
from lightning_lambdapo.learning.packing import MicroBatch, plan_micro_batches


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer update: a mini-batch of a rollout, with the counts of the whole global mini-batch.

    Attributes:
        batch: the ``B`` prompts of the rollout.
        rollout: its ``N`` completions.
        rows: ``(n,)`` int64 ascending, the rows that can change a parameter, or that the log needs.
        local_tokens: tokens of this rank's valid rows, also of those not in ``rows``.
        token_count: tokens of all ranks' valid rows.
        row_count: number of all ranks' valid rows.
        learns: False if no rank has a row to learn from.
        finite: False if any rank sampled a row from logits that were not finite.
        advantages: ``(N,)``, of all rows of the rollout.
        old_logprobs: ``(N, T)`` before the first update. None on-policy, where the ratio is exactly 1.
    """

    batch: PromptBatch
    rollout: Rollout
    rows: Tensor
    local_tokens: int
    token_count: int
    row_count: int
    learns: bool
    finite: bool
    advantages: Tensor
    old_logprobs: Tensor | None = None

    def micro_batches(self, *, max_tokens: int, share_prompts: bool) -> list[MicroBatch]:
        """The rows in micro-batches. See :func:`plan_micro_batches`."""
        return plan_micro_batches(
            self.batch, self.rollout, self.rows, max_tokens=max_tokens, share_prompts=share_prompts
        )


def plan_updates(
    batch: PromptBatch,
    rollout: Rollout,
    advantages: Tensor,
    valid: Tensor,
    *,
    algorithm: AlgorithmConfig,
    mini_batches: int,
) -> list[Update]:
    """Split a rollout into mini-batches by prompt. A collective.

    A prompt's position in the global batch decides its mini-batch (position ``i`` of rank ``r`` is ``i * world + r``).
    The same prompts therefore share an update on any number of ranks. Under the clipped loss without a KL term, rows of
    zero advantage have no gradient, so their log-probabilities are not computed. They still count in the denominators.
    A loss of the user's own may have a gradient in all valid rows.

    Args:
        batch: ``B`` prompts.
        rollout: ``N`` completions.
        advantages: ``(N,)``.
        valid: ``(N,)`` bool. Invalid rows are in neither numerator nor denominator.
        algorithm: whether there is a KL term, or a loss of the user's own.
        mini_batches: updates per pass over the rollout.
    """
    count, world = len(batch.input_ids), world_size()
    group_size = len(advantages) // count
    place = torch.arange(count, device=advantages.device) * world + rank()
    owner = (place * mini_batches // (count * world)).repeat_interleave(group_size)
    moving = valid if algorithm.kl_coef > 0 or algorithm.own_loss is not None else valid & (advantages != 0)
    wanted = valid if algorithm.needs_reference else moving
    broken = ~rollout.finite
    local = []
    for index in range(mini_batches):
        mine = owner == index
        counts = (mine & valid, mine & moving, mine & broken)
        local.append((int(rollout.lengths[mine & valid].sum()), *(int(chosen.sum()) for chosen in counts)))
    totals = [
        [sum(column) for column in zip(*ranks, strict=True)] for ranks in zip(*gather_objects(local), strict=True)
    ]
    return [
        Update(
            batch=batch,
            rollout=rollout,
            rows=(wanted & (owner == index)).nonzero().squeeze(-1),
            local_tokens=local[index][0],
            token_count=tokens,
            row_count=rows,
            learns=learners > 0,
            finite=broken_rows == 0,
            advantages=advantages,
        )
        for index, (tokens, rows, learners, broken_rows) in enumerate(totals)
    ]
