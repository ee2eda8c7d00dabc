"""The LightningModule: one ``training_step`` goes from a batch of prompts to the optimizer."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo import checks
from lightning_lambdapo.checkpointing import pending_validation, state
from lightning_lambdapo.checkpointing.files import guard_checkpoints, naming
from lightning_lambdapo.config import (
    AdapterConfig,
    AlgorithmConfig,
    EvaluationConfig,
    PerformanceConfig,
    PolicyConfig,
    RolloutConfig,
    from_mapping,
)
from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed import parallel
from lightning_lambdapo.distributed.interrupts import Interrupts
from lightning_lambdapo.distributed.lightning_internals import attached_trainer, built_by_cli
from lightning_lambdapo.distributed.seeding import log_seeds, step_randomness, with_step_randomness
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.evaluation.evaluator import Evaluator
from lightning_lambdapo.evaluation.judging import judge_rollout, prepare_references
from lightning_lambdapo.functional import sequence_scores
from lightning_lambdapo.functional.ranges import home_path, path_text
from lightning_lambdapo.learning.estimating import estimate_advantages
from lightning_lambdapo.learning.learner import Learner
from lightning_lambdapo.learning.optimizer import PolicyOptimizer
from lightning_lambdapo.learning.training_log import TrainingLog
from lightning_lambdapo.policy.fingerprint import fingerprint
from lightning_lambdapo.policy.loading import load_policy, load_tokenizer
from lightning_lambdapo.policy.model import Policy, causal_lm, with_causal_lm
from lightning_lambdapo.policy.reference import answering_as_reference, frozen_reference
from lightning_lambdapo.rewards import AccuracyReward, as_rewards
from lightning_lambdapo.rewards.base import RewardLike
from lightning_lambdapo.rewards.encoder import prepare_encoders
from lightning_lambdapo.rollout import RolloutEngine, prepare_engine
from lightning_lambdapo.rollout.build import build_engine
from lightning_lambdapo.rollout.sampler import RolloutSampler


def _adamw(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5)


class LambdaPOModule(LightningModule):
    r"""Reinforcement learning from verifiable rewards with pairwise, confidence-weighted advantages.

    One training step samples a group of ``G`` completions per prompt, rewards them, and turns rewards into advantages

    .. math:: A_i = \frac{1}{G - 1} \sum_{j \ne i} \sigma\!\left(\frac{s_i - s_j}{\tau}\right) (R_i - R_j)

    (the default ``weighting="confidence"``, ``reduction="mean"``). The confidence ``s`` is a completion's mean
    log-probability under the policy. The step then makes ``updates_per_rollout`` optimizer updates of the clipped
    surrogate loss. This is an independent implementation of the published description of LambdaPO (arXiv 2605.19416).
    Every default is this package's own.

    Hooks for subclasses are :meth:`build_policy`, :meth:`build_tokenizer` and :meth:`build_engine`.

    Args:
        policy: where the model comes from.
        lora: a LoRA adapter over a frozen base. None trains all weights (or continues ``policy.adapter``).
        rollout: how completions are generated for training.
        validation: how validation, test and prediction decode.
        algorithm: how rewards become advantages and the loss.
        rewards: judges of the completions, objects or plain functions. None means :class:`AccuracyReward` alone.
        optimizer: factory, parameters -> optimizer. Under LightningCLI a ``class_path`` with ``init_args``.
        lr_scheduler: factory, optimizer -> scheduler, stepped once per update. ``ReduceLROnPlateau`` is refused.
        max_grad_norm: gradients are clipped to this global norm. None does not clip.
        updates_per_rollout: optimizer updates per rollout, mini-batches times passes. 1 is on-policy: the ratio is
            exactly 1 and clipping does nothing.
        epochs_per_rollout: passes over each rollout. It must divide ``updates_per_rollout``.
        max_tokens_per_micro_batch: tokens, padding included, that go through the learning pass at once. It limits
            memory and changes no gradient.
        logprob_chunk_size: number of positions whose logits are in memory at once.
        max_skipped_updates: updates in a row that may be skipped for a non-finite gradient. One more is an error.
        performance: switches for ways of doing less work, for benchmarks.
        seed: seed of the sampling streams. None uses that of ``seed_everything``, or else 0.

    Attributes:
        tokenizer: ready after construction, before any weights are loaded.
        policy: the model, a ``PreTrainedModel`` or ``PeftModel``. It exists once ``configure_model`` has run.
        rollout_step: number of finished training steps.
    """

    policy: Policy

    def __init__(
        self,
        policy: PolicyConfig,
        lora: AdapterConfig | LoraConfig | None = None,
        rollout: RolloutConfig = RolloutConfig(),
        validation: EvaluationConfig = EvaluationConfig(),
        algorithm: AlgorithmConfig = AlgorithmConfig(),
        rewards: Sequence[RewardLike] | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        updates_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        max_tokens_per_micro_batch: int = 16384,
        logprob_chunk_size: int = 1024,
        max_skipped_updates: int = 3,
        performance: PerformanceConfig = PerformanceConfig(),
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.policy_config = from_mapping(PolicyConfig, policy)
        self.lora = from_mapping(AdapterConfig, lora) if isinstance(lora, Mapping) else lora
        self.rollout_config = from_mapping(RolloutConfig, rollout)
        self.validation_config = from_mapping(EvaluationConfig, validation)
        self.algorithm = from_mapping(AlgorithmConfig, algorithm)
        self.performance = from_mapping(PerformanceConfig, performance)
        checks.warn_of_settings(self.algorithm, self.rollout_config.sampling, updates_per_rollout)
        self.rewards = as_rewards([AccuracyReward()] if rewards is None else rewards)
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.epochs_per_rollout = epochs_per_rollout
        self.updates_per_rollout = updates_per_rollout
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.logprob_chunk_size = logprob_chunk_size
        self.max_skipped_updates = max_skipped_updates
        self.seed = seed
        checks.check_settings(self)
        self.automatic_optimization = False
        self.strict_loading = False  # frozen tensors are absent, and `load_state_dict` checks the others
        own_optimizer = None if optimizer is _adamw else optimizer
        live = state.live_objects(rewards=rewards, optimizer=own_optimizer, lr_scheduler=lr_scheduler)
        self.run_state = state.RunState(live_objects=live)
        self.interrupts = Interrupts()
        self.tally = Tally()
        self.reference: PreTrainedModel | None = None
        self.tokenizer = self.build_tokenizer()
        self.training_log = TrainingLog(self.algorithm, self.rewards)
        self.evaluator = Evaluator(self.validation_config, self.rewards)
        self.save_hyperparameters(*([] if built_by_cli() else [state.plain_settings(self)]))

    # -- what a subclass may replace ------------------------------------------------------------------------------

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """Hook: build the tokenizer. Called once, in the constructor."""
        return load_tokenizer(self.policy_config)

    def build_policy(self) -> Policy:
        """Hook: build the policy, with ``requires_grad`` set on what is trained. Called once, when a run starts."""
        return load_policy(
            self.policy_config,
            self.lora,
            seed=self.sampling_seed,
            reference=self.needs_reference,
            performance=self.performance,
        )

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """Hook: build the engine that generates the rollouts. Called once, when a run starts."""
        return build_engine(model, self.tokenizer, self.policy_config, self.rollout_config, self.performance)

    # -- one training step ----------------------------------------------------------------------------------------

    @with_step_randomness
    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """From prompts to optimizer: sample groups, judge, compare, learn, report."""
        batch, rollout, rewards = self.sample_and_judge(batch)  # G completions for each prompt, and their R_i
        confidence = self.confidence(rollout, rewards)  # s_i under the policy that sampled
        advantages = self.advantages(rewards, confidence)  # A_i = 1/(G-1) sum_j w_ij (R_i - R_j)
        for update in self.learner.updates(batch, rollout, advantages, rewards.valid):  # mini-batches x passes
            self.learner.step(update)  # clipped surrogate, KL, one optimizer step
        self.run_state.rollout_step += 1
        return self.report(batch, rollout, rewards, confidence, advantages)

    def sample_and_judge(self, batch: PromptBatch) -> tuple[PromptBatch, Rollout, RewardOutcome]:
        """Sample and judge the groups of one training step. Dynamic sampling may omit prompts."""
        self.tally.clear()
        judge = partial(judge_rollout, self.rewards, mask_truncated=self.algorithm.mask_truncated, tally=self.tally)
        return self.sampler.training_groups(
            batch, seed=self.sampling_seed, step=self.rollout_step, judge=judge, tally=self.tally
        )

    def confidence(self, rollout: Rollout, rewards: RewardOutcome) -> Tensor:
        """The policy's confidence in each completion, ``(B, G)``: its mean or summed log-probability."""
        scores = sequence_scores(rollout.sampling_logprobs, rollout.completion_mask, score=self.algorithm.score)
        return scores.view_as(rewards.total)

    def advantages(self, rewards: RewardOutcome, confidence: Tensor) -> Tensor:
        """Advantage of each row, ``(N,)``, from rewards and confidence, both ``(B, G)``."""
        return estimate_advantages(self.algorithm, rewards.total, confidence, rewards.valid).flatten()

    def report(
        self, batch: PromptBatch, rollout: Rollout, rewards: RewardOutcome, confidence: Tensor, advantages: Tensor
    ) -> dict[str, Any]:
        """Log ``train/...``, and return what callbacks receive from the step."""
        self.training_log.update(batch, rollout, rewards, confidence, advantages, self.tally)
        self.training_log.log(self, self.training_log.finish(self.tally), batch_size=len(batch.prompts))
        seen = {"batch": batch, "rollout": rollout, "rewards": rewards, "confidence": confidence}
        # The last two are names of release 0.1.
        return seen | {"advantages": advantages, "scores": rewards, "policy_scores": confidence}

    # -- validation, test, prediction -----------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample with ``validation``'s own settings and measure. Callbacks receive all of it."""
        return self._evaluate(batch, "val", batch_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """The same for the test set."""
        return self._evaluate(batch, "test", batch_idx)

    def _evaluate(self, batch: PromptBatch, stage: str, batch_idx: int) -> dict[str, Any]:
        checks.check_batch(batch)
        with step_randomness(self.sampling_seed, batch_idx):  # a function of the batch, so that evaluations repeat
            rollout = self.sampler.sample(batch, stage, seed=self.sampling_seed)
            return self.evaluator.judge(batch, rollout, stage)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        self.evaluator.start(self._stage, self.trainer)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...`` or ``test/...``."""
        self.evaluator.log(self, self._stage)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Complete each prompt. Each completion gives one record, with everything needed to judge it again."""
        checks.check_batch(batch)
        rollout = self.sampler.sample(batch, "predict", seed=self.sampling_seed)
        return rollout.records(batch, columns=True) if batch.prompts else []

    def evaluation_settings(self) -> dict[str, Any]:
        """Everything that the results of validation and test depend on, as plain data for a report."""
        longest = self.sampler.longest_completion("test")
        return self.evaluator.settings(self.policy_config, max_new_tokens=longest, seed=self.sampling_seed)

    @property
    def _stage(self) -> str:
        return "test" if self.trainer.testing else "val"

    # -- a run, from start to end ---------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Refuse ``Trainer`` settings that cannot work, before Lightning's own check and before weights are loaded."""
        checks.check_trainer(
            self.trainer,
            adapted=self.lora is not None or self.policy_config.adapter is not None,
            quantized=self.policy_config.quantization is not None,
        )
        checks.check_rewards(self.trainer, self.rewards, self.algorithm)
        checks.check_encoders(self.trainer, self.rewards)
        guard_checkpoints(self.trainer.strategy, partial(state.check, self))
        return []

    def configure_model(self) -> None:
        """Build policy, reference, engine and sampler, once."""
        if hasattr(self, "policy"):
            return
        self.policy = self.build_policy().train()  # rollouts and reference passes switch to eval mode themselves
        self.run_state.policy = fingerprint(self.policy)
        if self.needs_reference:
            self.reference = frozen_reference(self.policy)
        self.engine = prepare_engine(self.build_engine(self.causal_lm), self)
        trainer = attached_trainer(self)
        if trainer is not None:
            shard = partial(parallel.shard, strategy=trainer.strategy, device_mesh=self.device_mesh)
            self.policy = with_causal_lm(self.policy, shard(self.causal_lm))
            self.reference = None if self.reference is None else cast(PreTrainedModel, shard(self.reference))
        self.sampler = RolloutSampler(self)
        device = self.device if trainer is None else trainer.strategy.root_device
        prepare_encoders(
            self.rewards,
            causal_lm(self.policy if self.reference is None else self.reference),
            self.tokenizer,
            device,
            max_tokens=self.max_tokens_per_micro_batch,
            reading=partial(answering_as_reference, self.policy, self.reference),
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule over all the policy's parameters (frozen ones get no gradient)."""
        checks.check_trainable(self.policy)
        optimizer = checks.built("optimizer", self.optimizer_factory, self.policy.parameters())
        state.note_optimizer(self, self.run_state, optimizer)
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = checks.built("lr_scheduler", self.lr_scheduler_factory, optimizer)
        checks.check_scheduler(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Check that the data fits the rewards, and set up learning on its device."""
        checks.check_data(self.trainer, self.rewards, self.causal_lm, self.sampler.longest_completion)
        prepare_references(self.rewards, self.trainer)
        with self.trainer.strategy.precision_plugin.train_step_context():  # for the scorer's probe
            self.learner = Learner(
                self.policy,
                self.reference if self.algorithm.needs_reference else None,
                algorithm=self.algorithm,
                temperature=self.rollout_config.sampling.logprob_temperature,
                max_new_tokens=self.rollout_config.max_new_tokens,
                max_tokens=self.max_tokens_per_micro_batch,
                chunk_size=self.logprob_chunk_size,
                performance=self.performance,
                mini_batches=self.updates_per_rollout // self.epochs_per_rollout,
                passes=self.epochs_per_rollout,
                tally=self.tally,
                optimizer=PolicyOptimizer(self),
                exact_sampler=self.engine.exact_logprobs,
            )

    def on_train_start(self) -> None:
        """Let ranks stop together, log seeds, check the schedule, repeat a validation that the run was killed in."""
        self.interrupts.install(self.trainer)
        log_seeds(self.trainer, sampling=self.sampling_seed)
        checks.check_schedule_length(self.trainer, self.lr_schedulers(), self.updates_per_rollout)
        pending_validation.complete_epoch(self.trainer, self.run_state)

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Refuse a batch with too few prompts for the reserve or for the mini-batches."""
        checks.check_batch(batch)
        prompts = checks.check_reserve(self.rollout_config.reserve_prompts, len(batch.prompts))
        self.learner.passes = self.epochs_per_rollout
        self.learner.mini_batches = self.updates_per_rollout // self.epochs_per_rollout
        checks.check_mini_batches(self.learner.mini_batches, prompts * parallel.world_size())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient, or drop it if it is not finite."""
        self.learner.optimizer.clip(optimizer)

    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        """Stop if a rank received SIGTERM. Callbacks have saved their files by now."""
        self.run_state.updates_in_step = 0
        self.interrupts.stop_together()

    def teardown(self, stage: str) -> None:
        """Stop the rewards' workers and the engine."""
        for reward in self.rewards:
            reward.close()
        if hasattr(self, "sampler"):
            self.sampler.ahead.drop()
            self.engine.close()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is trained, and what resuming needs."""
        state.save(self, self.run_state, checkpoint, seed=self.sampling_seed)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this policy, and load its counters."""
        self.configure_model()
        state.load(self, self.run_state, checkpoint, seed=self.sampling_seed)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what is trained. Frozen weights come from ``policy`` and may be absent."""
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        return state.check_keys(self, keys, strict=strict)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Build a module from a checkpoint file. See Lightning's method of this name.

        Raises:
            CheckpointError: the file is missing, damaged, in shards, or of another kind of module.
        """
        path = path_text(checkpoint_path)
        if not isinstance(path, str) or "://" in path:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        with naming(path), state.settings_of_this_release(home_path(path), kwargs) as arguments:
            return super().load_from_checkpoint(path, *args, **arguments)

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def rollout_step(self) -> int:
        """Number of finished training steps."""
        return self.run_state.rollout_step

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The causal language model inside the policy, adapter layers and all."""
        return causal_lm(self.policy)

    @property
    def needs_reference(self) -> bool:
        """True if the policy before training is kept, for the KL term or for a reward that needs embeddings."""
        return self.algorithm.needs_reference or any(reward.needs_encoder for reward in self.rewards)

    @property
    def sampling_seed(self) -> int:
        """Seed of the sampling streams."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
