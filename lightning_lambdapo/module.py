"""The LightningModule: one ``training_step`` from a batch of prompts all the way to the optimizer."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo import checks, owed, parallel
from lightning_lambdapo.checkpoint_files import guard_checkpoints
from lightning_lambdapo.checkpoints import TrainableCheckpoint
from lightning_lambdapo.config import AlgorithmConfig, EvaluationConfig, from_mapping
from lightning_lambdapo.datatypes import PromptBatch, Rollout, Scores
from lightning_lambdapo.dynamic import collect_groups
from lightning_lambdapo.encoding import prepare_encoders
from lightning_lambdapo.evaluation import Evaluation, EvaluationSteps, StepReport, judge
from lightning_lambdapo.functional import group_advantages, lambda_advantages, sequence_scores
from lightning_lambdapo.interrupts import Interrupts
from lightning_lambdapo.learning import Learner, plan_updates
from lightning_lambdapo.policy import (
    AdapterConfig,
    Policy,
    PolicyConfig,
    causal_lm,
    eos_token_ids,
    evaluating,
    frozen_reference,
    load_policy,
    load_tokenizer,
    with_causal_lm,
)
from lightning_lambdapo.rewards import AccuracyReward, Reward, as_rewards
from lightning_lambdapo.rollout import GroupedEngine, HFEngine, RolloutConfig, RolloutEngine, SamplingConfig
from lightning_lambdapo.rollout.sampling import row_uniforms
from lightning_lambdapo.seeding import log_seeds, with_step_randomness
from lightning_lambdapo.tally import Tally
from lightning_lambdapo.updating import PolicyUpdates

RewardLike = Reward | Callable[..., Any]
_PLAIN = (
    "max_grad_norm",
    "updates_per_rollout",
    "epochs_per_rollout",
    "max_tokens_per_micro_batch",
    "logprob_chunk_size",
    "share_prompts",
    "recompute_logits",
    "max_skipped_updates",
    "seed",
)


def _adamw(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5)


class LambdaPOModule(PolicyUpdates, EvaluationSteps, TrainableCheckpoint, LightningModule):
    r"""Reinforcement learning from verifiable rewards with pairwise, confidence-weighted advantages.

    One training step samples a group of ``G`` completions per prompt, rewards them, and turns rewards into advantages

    .. math:: A_i = \frac{1}{G - 1} \sum_{j \ne i} \sigma\!\left(\frac{s_i - s_j}{\tau}\right) (R_i - R_j)

    (the default ``weighting="confidence"``, ``reduction="mean"``; ``s`` is a completion's mean log-probability under
    the policy), then makes ``updates_per_rollout`` optimizer updates of the clipped surrogate loss. An independent
    implementation of the published description of LambdaPO (arXiv 2605.19416); every default is this package's own.

    Three methods are hooks for subclasses: :meth:`build_policy`, :meth:`build_tokenizer` and :meth:`build_engine`.

    Args:
        policy: where the model comes from.
        lora: a LoRA adapter over a frozen base; None trains all weights (or continues ``policy.adapter``).
        rollout: how completions are generated for training.
        validation: how validation, test and prediction decode.
        algorithm: from rewards to loss.
        rewards: judges of the completions, objects or plain functions; None means :class:`AccuracyReward` alone.
        optimizer: factory, parameters -> optimizer. Under LightningCLI a ``class_path`` with ``init_args``.
        lr_scheduler: factory, optimizer -> scheduler, stepped once per update; ``ReduceLROnPlateau`` is refused.
        max_grad_norm: gradients are clipped to this global norm; None leaves them.
        updates_per_rollout: optimizer updates per rollout, mini-batches times passes. 1 is on-policy: the ratio is
            exactly 1 and clipping does nothing.
        epochs_per_rollout: passes over each rollout; divides ``updates_per_rollout``.
        max_tokens_per_micro_batch: tokens, padding included, that go through the learning pass at once. It bounds
            memory and changes no gradient.
        logprob_chunk_size: positions whose logits exist at once.
        share_prompts: in the learning pass, compute a prompt once for all rows of its group in the micro-batch.
        recompute_logits: compute each chunk of logits once more in the backward pass, instead of using it for the
            gradient while it exists (which needs an output head that is not trained).
        max_skipped_updates: updates in a row whose gradient may be non-finite (they are skipped) before an error.
        seed: of the sampling streams; None takes that of ``seed_everything``, else 0.

    Attributes:
        tokenizer: ready after construction, before any weights are loaded.
        policy: the model, a ``PreTrainedModel`` or ``PeftModel``; exists once ``configure_model`` has run.
        rollout_step: finished training steps.
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
        share_prompts: bool = True,
        recompute_logits: bool = False,
        max_skipped_updates: int = 3,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.policy_config = from_mapping(PolicyConfig, policy)
        self.lora = from_mapping(AdapterConfig, lora) if isinstance(lora, Mapping) else lora
        self.rollout_config = from_mapping(RolloutConfig, rollout)
        self.validation_config = from_mapping(EvaluationConfig, validation)
        self.algorithm = from_mapping(AlgorithmConfig, algorithm)
        checks.check_schedule(
            updates_per_rollout=updates_per_rollout,
            epochs_per_rollout=epochs_per_rollout,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        )
        checks.warn_of_settings(self.algorithm, self.rollout_config.sampling, updates_per_rollout)
        self.rewards = as_rewards([AccuracyReward()] if rewards is None else rewards)
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.epochs_per_rollout = epochs_per_rollout
        self.updates_per_rollout = updates_per_rollout
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.logprob_chunk_size = logprob_chunk_size
        self.share_prompts = share_prompts
        self.recompute_logits = recompute_logits
        self.max_skipped_updates = max_skipped_updates
        self.seed = seed
        self.automatic_optimization = False
        self.rollout_step = 0
        self.interrupts = Interrupts()
        self.reference: PreTrainedModel | None = None
        self.tokenizer = self.build_tokenizer()
        self.report = StepReport(self.algorithm, self.rewards)
        self.evaluations = nn.ModuleDict(
            {stage: Evaluation(self.validation_config, self.rewards) for stage in ("val", "test")}
        )
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()  # under LightningCLI: the parsed config, plain data already
            return
        plain = {name: getattr(self, name) for name in _PLAIN}  # live objects (rewards, factories) stay out
        configs: dict[str, Any] = {
            "policy": self.policy_config,
            "rollout": self.rollout_config,
            "validation": self.validation_config,
            "algorithm": self.algorithm,
        } | ({"lora": self.lora} if isinstance(self.lora, AdapterConfig) else {})
        self.save_hyperparameters(plain | {name: dataclasses.asdict(config) for name, config in configs.items()})

    # -- what a subclass may replace ------------------------------------------------------------------------------

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """Hook: the tokenizer; called once, in the constructor."""
        return load_tokenizer(self.policy_config)

    def build_policy(self) -> Policy:
        """Hook: the policy, with ``requires_grad`` set on what is to be trained; called once, when a run starts."""
        return load_policy(self.policy_config, self.lora, seed=self.sampling_seed, reference=self.needs_reference)

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """Hook: what generates the rollouts; called once, when a run starts."""
        eos_ids = eos_token_ids(model, self.tokenizer)
        pad_id = self.tokenizer.pad_token_id
        config = self.rollout_config
        arguments = self.tokenizer, eos_ids, eos_ids[0] if pad_id is None else pad_id
        return GroupedEngine(*arguments, config) if config.engine == "grouped" else HFEngine(*arguments)

    # -- set-up ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Refuse ``Trainer`` settings that cannot work, before Lightning's own check and before weights are loaded."""
        checks.check_trainer(
            self.trainer,
            adapted=self.lora is not None or self.policy_config.adapter is not None,
            quantized=self.policy_config.quantization is not None,
        )
        checks.check_encoders(self.trainer, self.rewards)
        guard_checkpoints(self.trainer.strategy, self.check_checkpoint)
        return []

    def configure_model(self) -> None:
        """Build policy, reference and engine, once."""
        if hasattr(self, "policy"):
            return
        # In train mode as Lightning expects; rollouts and reference scoring switch to eval mode themselves.
        self.policy = self.build_policy().train()
        if self.needs_reference:
            self.reference = frozen_reference(self.policy)
        self.engine = self.build_engine(self.causal_lm)
        if self._trainer is not None:
            shard = partial(parallel.shard, strategy=self.trainer.strategy, device_mesh=self.device_mesh)
            self.policy = with_causal_lm(self.policy, shard(self.causal_lm))
            self.reference = None if self.reference is None else cast(PreTrainedModel, shard(self.reference))
        device = self.device if self._trainer is None else self.trainer.strategy.root_device
        prepare_encoders(
            self.rewards, self.policy, self.reference, self.tokenizer, device, self.max_tokens_per_micro_batch
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule over all the policy's parameters (frozen ones get no gradient)."""
        checks.check_trainable(self.policy)
        optimizer = self.optimizer_factory(self.policy.parameters())
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = self.lr_scheduler_factory(optimizer)
        checks.check_scheduler(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Check the data against the rewards, and set up learning on the device where it runs."""
        data = getattr(self.trainer, "datamodule", None)
        if rows := getattr(data, "train_rows", None):
            checks.check_fields(self.rewards, rows)
        for split, length in getattr(data, "longest", {}).items():
            checks.check_context(
                self.causal_lm, length, self.longest_completion("train" if split == "train" else "val")
            )
        self.learner = Learner(
            self.policy,
            self.reference if self.algorithm.needs_reference else None,
            algorithm=self.algorithm,
            temperature=self.rollout_config.sampling.logprob_temperature,
            max_new_tokens=self.rollout_config.max_new_tokens,
            max_tokens=self.max_tokens_per_micro_batch,
            chunk_size=self.logprob_chunk_size,
            share_prompts=self.share_prompts,
            recompute_logits=self.recompute_logits,
        )

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Refuse a batch that has too few prompts to hold some back, or to make the mini-batches of."""
        prompts = checks.check_reserve(self.rollout_config.reserve_prompts, len(batch.prompts))
        checks.check_mini_batches(self.updates_per_rollout // self.epochs_per_rollout, prompts * parallel.world_size())

    def on_train_start(self) -> None:
        """Let all ranks stop together, say what randomness comes from, make the validation that a resumed run owes."""
        self.interrupts.install(self.trainer)
        log_seeds(self.trainer, sampling=self.sampling_seed)
        if self.owes_validation:
            self.owes_validation = False
            owed.make(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        """Stop here, after callbacks have saved what they save, where a rank was told to."""
        self.updates_in_step = 0
        self.interrupts.stop_together()

    def teardown(self, stage: str) -> None:
        """Stop the rewards' workers."""
        for reward in self.rewards:
            reward.close()

    # -- one training step ----------------------------------------------------------------------------------------

    @with_step_randomness
    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """From prompts to optimizer: sample groups, reward, compare, learn, report."""
        tally = Tally()
        batch, rollout, scores = self.collect(batch, tally)
        policy_scores = sequence_scores(
            rollout.sampling_logprobs, rollout.completion_mask, score=self.algorithm.score
        ).view_as(scores.total)
        advantages = self.advantages(scores, policy_scores)
        updates = plan_updates(
            batch,
            rollout,
            advantages,
            scores.valid.flatten(),
            algorithm=self.algorithm,
            mini_batches=self.updates_per_rollout // self.epochs_per_rollout,
        )
        on_policy = self.updates_per_rollout == 1
        old_logprobs = None if on_policy else self.learner.old_logprobs(updates, self.trainer.strategy, tally)
        for update in updates * self.epochs_per_rollout:
            self.learn(update, advantages, old_logprobs, tally)
        self.rollout_step += 1
        self.report.update(batch, rollout, scores, policy_scores, advantages, tally)
        self.report.log(self, self.report.finish(tally), batch_size=len(batch.prompts))
        return {
            "batch": batch,
            "rollout": rollout,
            "scores": scores,
            "policy_scores": policy_scores,
            "advantages": advantages,
        }

    def collect(self, batch: PromptBatch, tally: Tally) -> tuple[PromptBatch, Rollout, Scores]:
        """Sample and judge the groups of one training step; see :func:`~lightning_lambdapo.dynamic.collect_groups`."""
        config = self.rollout_config
        return collect_groups(
            batch,
            self.streams(batch, "train"),
            config.reserve_prompts,
            complete=partial(self.complete, sampling=config.sampling),
            judge=partial(judge, self.rewards, mask_truncated=self.algorithm.mask_truncated, tally=tally),
            tally=tally,
        )

    def sample(self, batch: PromptBatch, stage: str) -> Rollout:
        """Complete each prompt ``rollout.group_size`` times in training, ``validation.num_samples`` times elsewhere."""
        settings = self.rollout_config if stage == "train" else self.validation_config
        return cast(Rollout, self.complete(batch, self.streams(batch, stage), settings.sampling))

    @torch.no_grad()
    def complete(self, batch: PromptBatch, uniforms: Tensor, sampling: SamplingConfig) -> Rollout | None:
        """Complete each prompt once for each of its rows of ``uniforms``; None without prompts; a collective."""
        if batch.prompts:
            longest = int(batch.attention_mask.sum(-1).max())
            checks.check_context(self.causal_lm, longest, uniforms.shape[1], quiet=True)
        with evaluating(self.policy), parallel.gathered(self.causal_lm):
            if not batch.prompts:
                return None
            return self.engine.generate(self.causal_lm, batch, sampling=sampling, uniforms=uniforms)

    def streams(self, batch: PromptBatch, stage: str) -> Tensor:
        """Each row's stream of uniforms, ``(N, T)``; a collective."""
        training = stage == "train"
        settings = self.rollout_config if training else self.validation_config
        prompt_ids = batch.prompt_ids.tolist()
        return row_uniforms(
            seed=self.sampling_seed,
            stage=stage,
            step=self.rollout_step if training else 0,
            prompt_ids=prompt_ids,
            occurrences=parallel.global_occurrences(prompt_ids),
            num_samples=settings.group_size if isinstance(settings, RolloutConfig) else settings.num_samples,
            length=self.longest_completion(stage),
        )

    def longest_completion(self, stage: str) -> int:
        """Most new tokens of a completion, in training and elsewhere."""
        own = None if stage == "train" else self.validation_config.max_new_tokens
        return own or self.rollout_config.max_new_tokens

    def advantages(self, scores: Scores, policy_scores: Tensor) -> Tensor:
        """Advantage of each row, ``(N,)``, from rewards and policy scores, ``(B, G)`` both."""
        settings = self.algorithm
        if settings.estimator != "lambda":
            return group_advantages(scores.total, estimator=settings.estimator, valid=scores.valid).flatten()
        return lambda_advantages(
            scores.total,
            policy_scores,
            weighting=settings.weighting,
            temperature=settings.temperature,
            reduction=settings.reduction,
            center=settings.center,
            scale=settings.scale,
            valid=scores.valid,
            reward_std=parallel.global_std(scores.total[scores.valid]) if settings.scale == "batch" else None,
        ).flatten()

    # -- elsewhere -----------------------------------------------------------------------------------------------------

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Complete each prompt; one record per completion, with all that judging it again takes."""
        rollout = self.sample(batch, "predict")
        return rollout.records(batch, columns=True) if batch.prompts else []

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The causal language model inside the policy, adapter layers and all."""
        return causal_lm(self.policy)

    @property
    def needs_reference(self) -> bool:
        """True where the policy as it was before training is kept: for the KL term, or to read texts for a reward."""
        return self.algorithm.needs_reference or any(reward.needs_encoder for reward in self.rewards)

    @property
    def sampling_seed(self) -> int:
        """Seed of the sampling streams."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
