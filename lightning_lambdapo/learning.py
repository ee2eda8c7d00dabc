"""The learning pass: from advantages to gradients that do not depend on how rows are split."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from transformers import PreTrainedModel

from lightning_lambdapo.config import AlgorithmConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.functional import policy_loss
from lightning_lambdapo.packing import MicroBatch, plan_micro_batches
from lightning_lambdapo.parallel import (
    gather_objects,
    gradient_sync,
    is_sharded,
    micro_batch_count,
    rank,
    world_size,
)
from lightning_lambdapo.policy import Policy, causal_lm, evaluating, reference_mode
from lightning_lambdapo.scoring import CompletionScorer
from lightning_lambdapo.tally import Tally


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer update: a mini-batch of a rollout, with the counts of the whole global mini-batch.

    Attributes:
        micro_batches: the rows that can move a parameter, or that are wanted in the log.
        local_tokens: tokens of this rank's valid rows, also of those without a micro-batch.
        token_count: tokens of all ranks' valid rows.
        row_count: number of all ranks' valid rows.
        learns: False where no rank has a row to learn from.
    """

    micro_batches: list[MicroBatch]
    local_tokens: int
    token_count: int
    row_count: int
    learns: bool


def plan_updates(
    batch: PromptBatch,
    rollout: Rollout,
    advantages: Tensor,
    valid: Tensor,
    *,
    algorithm: AlgorithmConfig,
    mini_batches: int,
    max_tokens: int,
    share_prompts: bool = True,
) -> list[Update]:
    """Split a rollout into mini-batches by prompt, and each into micro-batches; a collective.

    A prompt belongs to a mini-batch by its place in the global batch (position ``i`` of rank ``r`` is ``i * world +
    r``), so the same prompts share an update on any number of ranks. Rows of zero advantage have no gradient without
    a KL term and are not scored; they count in the denominators all the same.

    Args:
        batch: ``B`` prompts.
        rollout: ``N`` completions.
        advantages: ``(N,)``.
        valid: ``(N,)`` bool; invalid rows are in neither numerator nor denominator.
        algorithm: whether there is a KL term.
        mini_batches: updates per pass over the rollout.
        max_tokens: budget of a micro-batch.
        share_prompts: pack the rows of a prompt with one copy of it, instead of padding them.
    """
    count, world = len(batch.input_ids), world_size()
    group_size = len(advantages) // count
    place = torch.arange(count, device=advantages.device) * world + rank()
    owner = (place * mini_batches // (count * world)).repeat_interleave(group_size)
    moving = valid if algorithm.kl_coef > 0 else valid & (advantages != 0)
    wanted = valid if algorithm.needs_reference else moving
    local = []
    for index in range(mini_batches):
        mine = owner == index
        local.append((int(rollout.lengths[mine & valid].sum()), int((mine & valid).sum()), int((mine & moving).sum())))
    totals = [
        [sum(column) for column in zip(*ranks, strict=True)] for ranks in zip(*gather_objects(local), strict=True)
    ]
    return [
        Update(
            micro_batches=plan_micro_batches(
                batch,
                rollout,
                (wanted & (owner == index)).nonzero().squeeze(-1),
                max_tokens=max_tokens,
                share_prompts=share_prompts,
            ),
            local_tokens=local[index][0],
            token_count=tokens,
            row_count=rows,
            learns=learners > 0,
        )
        for index, (tokens, rows, learners) in enumerate(totals)
    ]


class Learner:
    """Scores micro-batches with policy and reference, and accumulates the gradient of an update.

    Args:
        policy: what is trained.
        reference: a frozen copy of it; None where switching the policy's adapter gives the reference.
        algorithm: the loss's settings.
        temperature: divisor of the logits in every log-probability, that of sampling.
        max_new_tokens: factor of the denominator under ``aggregation="constant"``.
        chunk_size: positions whose logits exist at once.
        share_prompts: score the rows of a prompt with one copy of it, where the model can.
        recompute_logits: see :class:`CompletionScorer`.
    """

    def __init__(
        self,
        policy: Policy,
        reference: PreTrainedModel | None,
        *,
        algorithm: AlgorithmConfig,
        temperature: float,
        max_new_tokens: int,
        chunk_size: int,
        share_prompts: bool = True,
        recompute_logits: bool = False,
    ) -> None:
        self.policy = policy
        self.algorithm = algorithm
        self.max_new_tokens = max_new_tokens
        make_scorer = partial(
            CompletionScorer,
            temperature=temperature,
            chunk_size=chunk_size,
            share_prompts=share_prompts,
            recompute_logits=recompute_logits,
        )
        self.scorer = make_scorer(causal_lm(policy))
        self.reference_scorer = self.scorer if reference is None else make_scorer(reference)

    @property
    def share_prompts(self) -> bool:
        """Whether micro-batches may be packed."""
        return self.scorer.share_prompts

    @torch.no_grad()
    def old_logprobs(self, updates: list[Update], rollout: Rollout, tally: Tally) -> Tensor:
        """Log-probabilities ``(N, T)`` before the first update of every row that will be learned from; 0 elsewhere."""
        logprobs = torch.zeros_like(rollout.sampling_logprobs)
        with evaluating(self.policy), self.scorer.attention():
            for micro_batch in (each for update in updates for each in update.micro_batches):
                scored = self.scorer(micro_batch)
                logprobs[micro_batch.rows, : scored.shape[1]] = scored.to(logprobs)
                _tally_drift(tally, micro_batch, rollout, scored)
        return logprobs

    @torch.no_grad()
    def ref_logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """Log-probabilities ``(n, T')`` under the reference."""
        if self.reference_scorer is not self.scorer:
            with self.reference_scorer.attention():
                return self.reference_scorer(micro_batch)
        with evaluating(self.policy), reference_mode(self.policy):
            return self.scorer(micro_batch)

    def accumulate(
        self,
        update: Update,
        rollout: Rollout,
        advantages: Tensor,
        old_logprobs: Tensor | None,
        *,
        strategy: Strategy,
        backward: Callable[[Tensor], None],
        tally: Tally,
    ) -> None:
        """Back-propagate the update's loss, micro-batch by micro-batch; a collective.

        Args:
            update: the mini-batch.
            rollout: all ``N`` rows.
            advantages: ``(N,)``.
            old_logprobs: ``(N, T)``, or None on-policy: the ratio is then exactly 1.
            strategy: decides when gradients are reduced over ranks.
            backward: Lightning's ``manual_backward``.
            tally: takes the statistics.
        """
        tally.ratio("clip_fraction", 0.0, update.local_tokens)
        tally.ratio("loss", 0.0, 1 / world_size())
        passes = micro_batch_count(len(update.micro_batches), strategy)
        for index in range(passes):
            # Activation checkpointing runs the model again in the backward pass, which needs the same attention.
            with gradient_sync(strategy, last=index == passes - 1), self.scorer.attention():
                if index < len(update.micro_batches):
                    loss = self._loss(update, update.micro_batches[index], rollout, advantages, old_logprobs, tally)
                else:
                    loss = self._idle_loss(strategy)
                # Strategies average gradients over ranks, and the loss is divided by global counts already.
                backward(loss * world_size())

    def _loss(
        self,
        update: Update,
        micro_batch: MicroBatch,
        rollout: Rollout,
        advantages: Tensor,
        old_logprobs: Tensor | None,
        tally: Tally,
    ) -> Tensor:
        algorithm, rows, mask = self.algorithm, micro_batch.rows, micro_batch.completion_mask
        ref_logprobs = self.ref_logprobs(micro_batch) if algorithm.needs_reference else None
        logprobs = self.scorer(micro_batch)
        if old_logprobs is None:
            _tally_drift(tally, micro_batch, rollout, logprobs.detach())
        output = policy_loss(
            logprobs,
            logprobs.detach() if old_logprobs is None else old_logprobs[rows, : mask.shape[1]],
            ref_logprobs,
            advantages[rows],
            mask,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            level=algorithm.importance_level,
            kl_coef=algorithm.kl_coef,
            kl=algorithm.kl_estimator,
            aggregation=algorithm.aggregation,
            max_new_tokens=self.max_new_tokens,
            token_count=update.token_count,
            row_count=update.row_count,
        )
        tokens = int(mask.sum())
        tally.ratio("loss", output.loss.item(), 0.0)
        tally.ratio("clip_fraction", output.clip_fraction.item() * tokens, 0.0)
        tally.maximum("ratio_max", output.ratio_max)
        if output.mean_kl is not None:
            tally.ratio("kl", output.mean_kl.item() * tokens, tokens)
        return output.loss

    def _idle_loss(self, strategy: Strategy) -> Tensor:
        """A loss of 0 with a gradient of 0 everywhere, for a rank whose peers have more rows."""
        if is_sharded(strategy):  # forwards are collectives: go through the model with one token
            token = torch.zeros(1, 2, dtype=torch.long, device=self.policy.device)
            return self.scorer(MicroBatch.of_tokens(token, packed=self.share_prompts)).sum() * 0
        return torch.stack([p.sum() for p in self.policy.parameters() if p.requires_grad]).sum() * 0


def _tally_drift(tally: Tally, micro_batch: MicroBatch, rollout: Rollout, logprobs: Tensor) -> None:
    """How far scoring is from sampling for the same weights: different batch shapes, kernels or precision."""
    mask = micro_batch.completion_mask
    sampled = rollout.sampling_logprobs[micro_batch.rows, : mask.shape[1]]
    drift = (sampled.to(logprobs) - logprobs)[mask].abs()
    tally.mean("sampling_drift", drift)
    tally.maximum("sampling_drift_max", drift)
