"""Sampling for every stage: the settings, the stream of each row, and the call of the engine."""

from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lambdapo.checkpointing.state import RunState
from lightning_lambdapo.checks import check_context
from lightning_lambdapo.config import EvaluationConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed.lightning_internals import attached_trainer
from lightning_lambdapo.distributed.parallel import gathered, global_occurrences
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.policy.model import Policy, causal_lm, evaluating
from lightning_lambdapo.rollout.ahead import SampledAhead, following_batch
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
        self.ahead = SampledAhead()

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
            complete=partial(self.complete, sampling=self.training.sampling, training=True),
            judge=judge,
            tally=tally,
        )
        self._sample_ahead(seed=seed, step=step + 1)
        self.module.engine.sleep()
        tally.maximum("rollout_memory_retries", torch.tensor(self.live_tokens.retries))
        return collected

    def sample(self, batch: PromptBatch, stage: str, *, seed: int) -> Rollout:
        """Complete each prompt ``validation.num_samples`` times, outside of training. A collective."""
        uniforms = self.streams(batch, stage, seed=seed, step=0)
        return cast(Rollout, self.complete(batch, uniforms, self.evaluation.sampling))

    @torch.no_grad()
    def complete(
        self, batch: PromptBatch, uniforms: Tensor, sampling: SamplingConfig, *, training: bool = False
    ) -> Rollout | None:
        """Complete each prompt once for each of its rows of ``uniforms``. None without prompts. A collective."""
        model = causal_lm(self.module.policy)
        policy, engine = self.module.policy, self.module.engine
        generate = partial(self._generate, batch, uniforms, sampling)
        with evaluating(policy):
            if not engine.has_own_weights:
                with gathered(model):
                    return generate()
            early = self.ahead.finished()  # before the engine gets other weights
            if early is not None and early.version == self.delivery.version:
                given = early.batch, early.rollout, self.training.sampling
                self.delivery.check(policy, *given, engine.cached_block, updated=True)
            version = self.delivery.next_version(policy)
            if engine.version != version:
                with gathered(model):
                    engine.sync(policy, version)
            taken = self.ahead.take(batch) if training else None
            if taken is not None:
                return taken
            rollout = generate()
            self.delivery.check(policy, batch, rollout, sampling, engine.cached_block)
            return rollout

    def _generate(self, batch: PromptBatch, uniforms: Tensor, sampling: SamplingConfig) -> Rollout | None:
        if not batch.prompts:
            return None
        model = causal_lm(self.module.policy)
        check_context(model, int(batch.attention_mask.sum(-1).max()), uniforms.shape[1], quiet=True)
        return self.live_tokens.generate(self.module.engine, model, batch, sampling=sampling, uniforms=uniforms)

    def _sample_ahead(self, *, seed: int, step: int) -> None:
        """Begin to sample the next training step's rollout, if the engine may. A collective then."""
        if not self.module.engine.max_staleness:
            return
        following = following_batch(attached_trainer(cast(LightningModule, self.module)))
        if following is None:
            return
        device = causal_lm(self.module.policy).device
        moved = PromptBatch._make(each.to(device) if isinstance(each, Tensor) else each for each in following)
        uniforms = self.streams(moved, "train", seed=seed, step=step)
        generate = partial(self._generate, moved, uniforms, self.training.sampling)
        self.ahead.start(moved, self.delivery.version, cast(Callable[[], Rollout], torch.no_grad()(generate)))

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
