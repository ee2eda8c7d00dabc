"""Sampling for every stage: the settings, the stream of each row, and the call of the engine."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from lightning_lambdapo.checks import check_context
from lightning_lambdapo.config import EvaluationConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed.parallel import gathered, global_occurrences
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.policy.model import Policy, causal_lm, evaluating
from lightning_lambdapo.rollout.dynamic_sampling import collect_groups
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.sampling import row_uniforms


class RolloutSampler:
    """Completes prompts with the policy, in training and elsewhere.

    Args:
        policy: the policy that is trained.
        engine: generates the completions.
        training: how completions are generated in training.
        evaluation: how validation, test and prediction decode.
    """

    def __init__(
        self, policy: Policy, engine: RolloutEngine, training: RolloutConfig, evaluation: EvaluationConfig
    ) -> None:
        self.policy = policy
        self.engine = engine
        self.training = training
        self.evaluation = evaluation

    def longest_completion(self, stage: str) -> int:
        """Maximum number of new tokens of a completion in this stage."""
        own = None if stage == "train" else self.evaluation.max_new_tokens
        return own or self.training.max_new_tokens

    def training_groups(
        self,
        batch: PromptBatch,
        *,
        seed: int,
        step: int,
        judge: Callable[[PromptBatch, Rollout], RewardOutcome],
        tally: Tally,
    ) -> tuple[PromptBatch, Rollout, RewardOutcome]:
        """Sample and judge the groups of one training step. See :func:`collect_groups`. A collective."""
        return collect_groups(
            batch,
            self.streams(batch, "train", seed=seed, step=step),
            self.training.reserve_prompts,
            complete=partial(self.complete, sampling=self.training.sampling),
            judge=judge,
            tally=tally,
        )

    def sample(self, batch: PromptBatch, stage: str, *, seed: int) -> Rollout:
        """Complete each prompt ``validation.num_samples`` times, outside of training. A collective."""
        uniforms = self.streams(batch, stage, seed=seed, step=0)
        return cast(Rollout, self.complete(batch, uniforms, self.evaluation.sampling))

    @torch.no_grad()
    def complete(self, batch: PromptBatch, uniforms: Tensor, sampling: SamplingConfig) -> Rollout | None:
        """Complete each prompt once for each of its rows of ``uniforms``. None without prompts. A collective."""
        model = causal_lm(self.policy)
        if batch.prompts:
            check_context(model, int(batch.attention_mask.sum(-1).max()), uniforms.shape[1], quiet=True)
        with evaluating(self.policy), gathered(model):
            if not batch.prompts:
                return None
            return self.engine.generate(model, batch, sampling=sampling, uniforms=uniforms)

    def streams(self, batch: PromptBatch, stage: str, *, seed: int, step: int) -> Tensor:
        """Each row's stream of uniforms, ``(N, T)``. A collective."""
        prompt_ids = batch.prompt_ids.tolist()
        return row_uniforms(
            seed=seed,
            stage=stage,
            step=step,
            prompt_ids=prompt_ids,
            occurrences=global_occurrences(prompt_ids),
            num_samples=self.training.group_size if stage == "train" else self.evaluation.num_samples,
            length=self.longest_completion(stage),
        )
