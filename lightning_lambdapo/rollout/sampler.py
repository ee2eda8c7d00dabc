"""Sampling for every stage: the settings, the stream of each row, and the call of the engine."""

from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from lightning_lambdapo.checkpointing.state import RunState
from lightning_lambdapo.checks import check_context
from lightning_lambdapo.config import EvaluationConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed.parallel import gathered, global_occurrences
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.policy.model import Policy, causal_lm, evaluating
from lightning_lambdapo.rollout.delivery import Delivery
from lightning_lambdapo.rollout.dynamic_sampling import collect_groups
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.memory import LiveTokens
from lightning_lambdapo.rollout.sampling import row_uniforms


class _SamplingModule(Protocol):
    """What the sampler reads of its module. It reads it at every call, because users may replace any of it."""

    policy: Policy
    engine: RolloutEngine
    rollout_config: RolloutConfig
    validation_config: EvaluationConfig
    run_state: RunState


class RolloutSampler:
    """Completes prompts with the policy, in training and elsewhere.

    Args:
        module: has policy, engine, settings, and the state that knows the generation of the streams.
    """

    def __init__(self, module: _SamplingModule) -> None:
        self.module = module
        self.live_tokens = LiveTokens(self.training.max_live_tokens)
        self.delivery = Delivery()

    @property
    def training(self) -> RolloutConfig:
        """How completions are generated in training."""
        return self.module.rollout_config

    @property
    def evaluation(self) -> EvaluationConfig:
        """How validation, test and prediction decode."""
        return self.module.validation_config

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
        collected = collect_groups(
            batch,
            self.streams(batch, "train", seed=seed, step=step),
            self.training.reserve_prompts,
            complete=partial(self.complete, sampling=self.training.sampling),
            judge=judge,
            tally=tally,
        )
        self.module.engine.sleep()
        tally.maximum("rollout_memory_retries", torch.tensor(self.live_tokens.retries))
        return collected

    def sample(self, batch: PromptBatch, stage: str, *, seed: int) -> Rollout:
        """Complete each prompt ``validation.num_samples`` times, outside of training. A collective."""
        uniforms = self.streams(batch, stage, seed=seed, step=0)
        return cast(Rollout, self.complete(batch, uniforms, self.evaluation.sampling))

    @torch.no_grad()
    def complete(self, batch: PromptBatch, uniforms: Tensor, sampling: SamplingConfig) -> Rollout | None:
        """Complete each prompt once for each of its rows of ``uniforms``. None without prompts. A collective."""
        model = causal_lm(self.module.policy)
        if batch.prompts:
            check_context(model, int(batch.attention_mask.sum(-1).max()), uniforms.shape[1], quiet=True)
        policy, engine = self.module.policy, self.module.engine

        def generate() -> Rollout | None:
            if not batch.prompts:
                return None
            return self.live_tokens.generate(engine, model, batch, sampling=sampling, uniforms=uniforms)

        with evaluating(policy):
            if not engine.has_own_weights:
                with gathered(model):
                    return generate()
            version = self.delivery.next_version(policy)
            if engine.version != version:
                with gathered(model):
                    engine.sync(policy, version)
            rollout = generate()
            self.delivery.check(policy, batch, rollout, sampling, engine.cached_block)
            return rollout

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
            streams=self.module.run_state.streams,
        )
