"""The learning pass: gradients from advantages, independent of how rows are split."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_lambdapo.config import AlgorithmConfig, PerformanceConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.distributed.parallel import (
    idle_passes,
    is_sharded,
    local_gradients,
    rank,
    replicates,
    world_size,
)
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.functional import policy_loss
from lightning_lambdapo.functional.masking import at_least_float32
from lightning_lambdapo.functional.own_functions import own_loss
from lightning_lambdapo.learning.importance import correction_in_use, tally_importance
from lightning_lambdapo.learning.optimizer import PolicyOptimizer
from lightning_lambdapo.learning.packing import MicroBatch
from lightning_lambdapo.learning.scoring import CompletionScorer
from lightning_lambdapo.learning.updates import Update, plan_updates
from lightning_lambdapo.policy.model import Policy, causal_lm, evaluating
from lightning_lambdapo.policy.reference import answering_as_reference


class Learner:
    """Learns from a rollout by optimizer updates, each over any number of micro-batches.

    Args:
        policy: the policy that is trained.
        reference: a frozen copy of it. None if switching the policy's adapter gives the reference.
        algorithm: the loss's settings.
        temperature: divisor of the logits in every log-probability, that of sampling.
        max_new_tokens: factor of the denominator under ``aggregation="constant"``.
        max_tokens: budget of a micro-batch. It is halved for the rest of the run when one runs out of memory.
        chunk_size: number of positions whose logits are in memory at once.
        performance: switches of the learning pass.
        mini_batches: updates per pass over a rollout.
        passes: number of passes over each rollout.
        tally: receives the statistics of :meth:`updates` and :meth:`step`.
        optimizer: changes the parameters in :meth:`step`.
        exact_sampler: the engine's log-probabilities are those of the learning pass, to rounding.

    Attributes:
        loss: the loss of a micro-batch, a function like :func:`policy_loss`.
        correction: the importance correction of this run, see :func:`correction_in_use`.
        memory_retries: number of times that a micro-batch has run out of memory.
    """

    def __init__(
        self,
        policy: Policy,
        reference: PreTrainedModel | None,
        *,
        algorithm: AlgorithmConfig,
        temperature: float,
        max_new_tokens: int,
        max_tokens: int,
        chunk_size: int,
        optimizer: PolicyOptimizer,
        performance: PerformanceConfig = PerformanceConfig(),
        mini_batches: int = 1,
        passes: int = 1,
        tally: Tally | None = None,
        exact_sampler: bool = True,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.algorithm = algorithm
        self.loss = policy_loss if algorithm.own_loss is None else own_loss(algorithm.own_loss)
        self.max_new_tokens = max_new_tokens
        self.max_tokens = max_tokens
        self.mini_batches = mini_batches
        self.passes = passes
        self.optimizer = optimizer
        self.tally = Tally() if tally is None else tally
        self.memory_retries = 0
        self.correction = correction_in_use(algorithm, policy, optimizer.strategy, exact_sampler=exact_sampler)
        make_scorer = partial(
            CompletionScorer,
            temperature=temperature,
            chunk_size=chunk_size,
            share_prompts=performance.share_prompts_in_learning,
            recompute_logits=performance.recompute_logits,
        )
        self.scorer = make_scorer(causal_lm(policy))
        self.reference_scorer = self.scorer if reference is None else make_scorer(causal_lm(reference))

    def updates(self, batch: PromptBatch, rollout: Rollout, advantages: Tensor, valid: Tensor) -> list[Update]:
        """The optimizer updates of one rollout, mini-batches times passes, in order. A collective.

        Args:
            batch: ``B`` prompts.
            rollout: ``N`` completions.
            advantages: ``(N,)``.
            valid: ``(B, G)`` bool, rows with a usable reward.
        """
        planned = plan_updates(
            batch, rollout, advantages, valid.flatten(), algorithm=self.algorithm, mini_batches=self.mini_batches
        )
        if self.mini_batches * self.passes > 1:
            old_logprobs = self.old_logprobs(planned)
            planned = [replace(update, old_logprobs=old_logprobs) for update in planned]
        return planned * self.passes

    def step(self, update: Update) -> None:
        """Make one optimizer update. Without a row to learn from, no parameter changes. A collective."""
        optimizer, tally = self.optimizer, self.tally
        optimizer.zero_grad(tally)
        tally.ratio("empty_updates", float(not update.learns), 1.0)
        if update.learns and update.finite:
            self.accumulate(update)
            optimizer.step(tally)
        else:
            optimizer.step_without_gradient(finite=update.finite)
        tally.maximum("memory_retries", torch.tensor(self.memory_retries))
        optimizer.step_schedule(tally)

    def micro_batches(self, update: Update) -> list[MicroBatch]:
        """The update's rows under the current token budget, packed if the scorer can share prompts."""
        return update.micro_batches(max_tokens=self.max_tokens, share_prompts=self.scorer.share_prompts)

    @torch.no_grad()
    def old_logprobs(self, updates: list[Update]) -> Tensor:
        """Log-probabilities ``(N, T)`` before the first update, for every row to learn from. 0 elsewhere."""
        rollout = updates[0].rollout
        logprobs = torch.zeros_like(at_least_float32(rollout.sampling_logprobs))

        def record(update: Update, micro_batches: list[MicroBatch], idle: int, tally: Tally) -> None:
            for _ in range(idle):
                self.scorer(self._idle_micro_batch())
            for micro_batch in micro_batches:
                scored, entropy = self.scorer.with_entropy(micro_batch, wanted=rollout.entropy is None)
                micro_batch.release()
                if entropy is not None:
                    tally.mean("entropy", entropy)
                logprobs[micro_batch.rows, : scored.shape[1]] = scored.to(logprobs)
                sampled = rollout.sampling_logprobs[micro_batch.rows, : scored.shape[1]]
                _tally_drift(tally, sampled, scored, micro_batch.completion_mask)

        with evaluating(self.policy), self.scorer.attention():
            for update in updates:
                self._within_memory(update, record)
        return logprobs

    @torch.no_grad()
    def ref_logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """Log-probabilities ``(n, T')`` under the reference."""
        with self.reference_scorer.attention(), answering_as_reference(self.policy, self.reference):
            return self.reference_scorer(micro_batch)

    def accumulate(self, update: Update) -> None:
        """Back-propagate the update's loss, micro-batch by micro-batch. A collective.

        If each rank has the whole model, it first sums the gradients of its own rows, over any number of micro-batches.
        A last backward pass without rows then sums them over the ranks.

        Args:
            update: the mini-batch.

        Raises:
            torch.OutOfMemoryError: a single row does not fit. Or weights are in shards, so no rank can retry alone.
        """
        strategy, backward = self.optimizer.strategy, self.optimizer.backward
        self.tally.ratio("clip_fraction", 0.0, update.local_tokens)
        self.tally.ratio("loss", 0.0, 1 / world_size())

        def back_propagate(update: Update, micro_batches: list[MicroBatch], idle: int, tally: Tally) -> None:
            # With activation checkpointing the backward pass runs the model again, with the same attention.
            with local_gradients(strategy), self.scorer.attention():
                for micro_batch in micro_batches:
                    loss = self._loss(update, micro_batch, tally)
                    # Strategies average gradients over ranks, but the loss is already divided by global counts.
                    backward(loss * world_size())
                    micro_batch.release()
                for _ in range(idle):
                    backward(self._idle_loss())

        self._within_memory(update, back_propagate)
        if replicates(strategy):
            backward(torch.stack([p.sum() for p in self.policy.parameters() if p.requires_grad]).sum() * 0)

    def _within_memory(
        self,
        update: Update,
        work: Callable[[Update, list[MicroBatch], int, Tally], None],
    ) -> None:
        """Do ``work``, and repeat all of it with half the token budget when memory runs out.

        Ranks with the whole model make no collective in ``work``, so that each can repeat it alone. If weights are in
        shards, every pass is a collective, and ``work`` receives the number of idle passes to make.
        """
        strategy = self.optimizer.strategy
        while True:
            attempt = Tally()
            micro_batches = self.micro_batches(update)
            try:
                work(update, micro_batches, idle_passes(len(micro_batches), strategy), attempt)
            except torch.OutOfMemoryError as error:
                if is_sharded(strategy):
                    raise torch.OutOfMemoryError(
                        f"Rank {rank()} ran out of memory in the learning pass. Ranks that hold shards cannot start "
                        f"over by themselves. Lower `max_tokens_per_micro_batch` ({self.max_tokens}). {error}"
                    ) from error
                largest = max((len(micro_batch.rows) for micro_batch in micro_batches), default=0)
                if largest < 2:
                    raise torch.OutOfMemoryError(
                        "A single row of the learning pass does not fit in memory. Lower `rollout.max_new_tokens` or "
                        f"`logprob_chunk_size`, or set `policy.gradient_checkpointing`. {error}"
                    ) from error
            else:
                self.tally.merge(attempt)
                return
            # The traceback keeps the failed attempt's tensors alive, so memory is freed only after the except block.
            del attempt, micro_batches
            self.policy.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.max_tokens //= 2
            self.memory_retries += 1
            warnings.warn(
                f"A micro-batch ran out of memory. From now on none has more than {self.max_tokens} tokens. These rows "
                "are computed again. Set `max_tokens_per_micro_batch` to that number.",
                stacklevel=2,
            )

    def _idle_micro_batch(self) -> MicroBatch:
        """One token, for a pass that only joins the collectives of other ranks."""
        token = torch.zeros(1, 2, dtype=torch.long, device=self.policy.device)
        return MicroBatch.of_tokens(token, packed=self.scorer.share_prompts)

    def _idle_loss(self) -> Tensor:
        """A loss of 0 that runs the same models as :meth:`_loss`."""
        if self.algorithm.needs_reference:
            self.ref_logprobs(self._idle_micro_batch())
        return self.scorer(self._idle_micro_batch()).sum() * 0

    def _loss(self, update: Update, micro_batch: MicroBatch, tally: Tally) -> Tensor:
        algorithm, rows, mask = self.algorithm, micro_batch.rows, micro_batch.completion_mask
        ref_logprobs = self.ref_logprobs(micro_batch) if algorithm.needs_reference else None
        on_policy = update.old_logprobs is None
        logprobs, entropy = self.scorer.with_entropy(micro_batch, wanted=on_policy and update.rollout.entropy is None)
        sampled = update.rollout.sampling_logprobs[rows, : mask.shape[1]]
        if on_policy:
            _tally_drift(tally, sampled, logprobs.detach(), mask)
        if entropy is not None:
            tally.mean("entropy", entropy)
        output = self.loss(
            logprobs,
            logprobs.detach() if update.old_logprobs is None else update.old_logprobs[rows, : mask.shape[1]],
            ref_logprobs,
            update.advantages[rows],
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
            behavior_logprobs=None if self.correction is None else sampled,
            importance_correction=self.correction or "truncate",
            importance_cap=algorithm.importance_cap,
            importance_correction_level=algorithm.importance_correction_level,
        )
        tokens = int(mask.sum())
        tally.ratio("loss", output.loss.item(), 0.0)
        tally.ratio("clip_fraction", output.clip_fraction.item() * tokens, 0.0)
        tally.maximum("ratio_max", output.ratio_max)
        if output.importance is not None:
            tally_importance(tally, output.importance)
        if output.mean_kl is not None:
            tally.ratio("kl", output.mean_kl.item() * tokens, tokens)
        return output.loss


def _tally_drift(tally: Tally, sampled: Tensor, logprobs: Tensor, mask: Tensor) -> None:
    """Tally how far log-probabilities differ from those at sampling, by batch shapes, kernels or precision."""
    drift = (sampled.to(logprobs) - logprobs)[mask].abs()
    tally.mean("sampling_drift", drift)
    tally.maximum("sampling_drift_max", drift)
