"""Every check that is made before a rollout is computed."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import LoraConfig
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, PolynomialLR, ReduceLROnPlateau
from transformers import PreTrainedModel

from lightning_lambdapo.config import AdapterConfig, AlgorithmConfig, SamplingConfig
from lightning_lambdapo.datatypes import ROW_FIELDS
from lightning_lambdapo.distributed.fsdp1 import flattens
from lightning_lambdapo.distributed.lightning_internals import expand_home
from lightning_lambdapo.distributed.parallel import is_sharded
from lightning_lambdapo.functional.ranges import check_real, check_seed, check_whole
from lightning_lambdapo.rewards import FunctionReward, Reward

T = TypeVar("T")

#: Ratios per sequence stay far closer to 1 than ratios per token. GSPO's paper clips them at 3e-4 and 4e-4.
_WIDEST_SEQUENCE_CLIP = 0.02


def check_schedule(updates_per_rollout: int, epochs_per_rollout: int, max_tokens_per_micro_batch: int) -> None:
    """Refuse impossible numbers of updates."""
    if updates_per_rollout < 1 or epochs_per_rollout < 1 or updates_per_rollout % epochs_per_rollout:
        raise ValueError(
            f"`updates_per_rollout` ({updates_per_rollout}) must be a positive multiple of `epochs_per_rollout` "
            f"({epochs_per_rollout}): it is mini-batches times passes over the rollout."
        )
    if max_tokens_per_micro_batch < 1:
        raise ValueError(f"`max_tokens_per_micro_batch` must be at least 1, got {max_tokens_per_micro_batch}.")


class _Settings(Protocol):
    """The module's own settings."""

    lora: AdapterConfig | LoraConfig | None
    max_grad_norm: float | None
    updates_per_rollout: int
    epochs_per_rollout: int
    max_tokens_per_micro_batch: int
    logprob_chunk_size: int
    max_skipped_updates: int
    seed: int | None


def check_settings(module: _Settings) -> None:
    """Refuse numbers of the module, and of its adapter, that train nothing or make no sense."""
    check_whole("updates_per_rollout", module.updates_per_rollout, 1)
    check_whole("epochs_per_rollout", module.epochs_per_rollout, 1)
    check_whole("max_tokens_per_micro_batch", module.max_tokens_per_micro_batch, 1)
    check_schedule(module.updates_per_rollout, module.epochs_per_rollout, module.max_tokens_per_micro_batch)
    check_whole("logprob_chunk_size", module.logprob_chunk_size, 1)
    check_whole("max_skipped_updates", module.max_skipped_updates, 0)
    if module.max_grad_norm is not None:
        wanted = "above 0, or null, which does not clip"
        check_real("max_grad_norm", module.max_grad_norm, lambda value: value > 0, wanted)
    if module.seed is not None:
        check_seed("seed", module.seed)
    if isinstance(module.lora, LoraConfig):
        patterns = {"rank_pattern": module.lora.rank_pattern, "alpha_pattern": module.lora.alpha_pattern}
        AdapterConfig(module.lora.r, module.lora.lora_alpha, module.lora.lora_dropout, options=patterns)


def warn_of_settings(algorithm: AlgorithmConfig, sampling: SamplingConfig, updates_per_rollout: int) -> None:
    """Warn of settings that are allowed but do less than their name says."""
    if sampling.filters:
        warnings.warn(
            f"Rollouts are drawn with {', '.join(sampling.filters)}, but log-probabilities are those of the unfiltered "
            "policy. Ratio, KL and confidence are computed from them.",
            stacklevel=3,
        )
    widest = max(algorithm.clip_low, algorithm.clip_high)
    if algorithm.importance_level == "sequence" and updates_per_rollout > 1 and widest > _WIDEST_SEQUENCE_CLIP:
        warnings.warn(
            f'importance_level="sequence" with clip_low = {algorithm.clip_low} and clip_high = {algorithm.clip_high} '
            "hardly ever clips: the ratio is that of a whole completion to the power of 1 / its length, and stays "
            "within thousandths of 1. GSPO's paper uses clip_low: 3.0e-4 and clip_high: 4.0e-4.",
            stacklevel=3,
        )
    if algorithm.kl_coef > 0 and algorithm.kl_estimator == "k1" and updates_per_rollout == 1:
        warnings.warn(
            'kl_estimator="k1" has zero expected gradient on-policy, so it has no effect. Use "k2" or "k3".',
            stacklevel=3,
        )


def check_trainer(trainer: Trainer, *, adapted: bool, quantized: bool) -> None:
    """Refuse ``Trainer`` settings that cannot work with manual optimisation or that silently do harm.

    In the loggers' directories ``~`` becomes the home directory.
    """
    expand_home(trainer)
    check_callbacks(trainer, quantized=quantized)
    if trainer.gradient_clip_val:  # 0 is Lightning's other way of not clipping
        raise ValueError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) has no effect under manual optimisation, so "
            "set `max_grad_norm` of LambdaPOModule, and gradient_clip_val to null."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) has no effect under manual "
            "optimisation. LambdaPOModule splits rollouts into micro-batches by `max_tokens_per_micro_batch`. For "
            "larger updates raise `batch_size`."
        )
    if quantized and flattens(trainer.strategy):
        raise ValueError(
            f"{type(trainer.strategy).__name__} flattens parameters, which quantised weights do not allow. Use "
            "ModelParallelStrategy, or set `policy.quantization` to null."
        )
    if trainer.precision in ("bf16-true", "16-true") and (adapted or trainer.state.fn == "fit"):
        what, dtype = ("the adapter", "bfloat16") if adapted else ("all trained weights", "float32")
        raise ValueError(
            f"Trainer(precision={trainer.precision!r}) would store {what} in 16 bits, where rounding loses a "
            f'step of a usual learning rate, so use precision="bf16-mixed" with `policy.dtype: {dtype}`.'
        )
    plugin = trainer.precision_plugin
    if isinstance(plugin, BitsandbytesPrecision | TransformerEnginePrecision):
        instead = (
            "Remove the plugin, and set `policy.quantization` (nf4, fp4 or int8), which quantises the frozen base alone"
            if isinstance(plugin, BitsandbytesPrecision)
            else 'Use precision="bf16-mixed"'
        )
        raise ValueError(
            f"{type(plugin).__name__} replaces every linear layer of the policy, those of its adapter included, and "
            f"not only the base's. {instead}."
        )


def check_callbacks(trainer: Trainer, *, quantized: bool) -> None:
    """Refuse callbacks of Lightning that cannot work with manual optimisation or with quantised weights."""
    if trainer.state.fn != "fit":
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, BatchSizeFinder):
            raise ValueError(
                f"{name} cannot try batch sizes: a training step samples its own rows, and does not hold them all in "
                "memory. Set `max_tokens_per_micro_batch`, which is halved when memory runs out, and limit rollouts by "
                "`rollout.max_live_tokens`."
            )
        if isinstance(callback, LearningRateFinder):
            raise ValueError(
                f"{name} raises the rate in every step until the loss diverges, and the loss of a policy gradient "
                "says nothing about that. Compare rates with `lambdapo compare --vary`."
            )
        if isinstance(callback, GradientAccumulationScheduler):
            raise ValueError(
                f"{name} has no effect under manual optimisation. Remove it. For larger updates raise `batch_size`."
            )
        if quantized and isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"{name} also averages the frozen base, and the bytes of quantised weights have no average. Set "
                "`policy.quantization` to null, or remove the callback."
            )


def check_schedule_length(trainer: Trainer, scheduler: object, updates_per_rollout: int) -> None:
    """Refuse a schedule that ends in an error before training does, and warn of one whose rate is then wrong.

    Args:
        trainer: its limits and its data give the number of updates. If these say none, nothing is checked.
        scheduler: the schedule, or one that consists of others. None does nothing.
        updates_per_rollout: optimizer updates in each training step.
    """
    updates = _planned_updates(trainer, updates_per_rollout)
    advice = f"training makes {updates} updates, {updates_per_rollout} in each training step, and each is a step of it"
    parts = getattr(scheduler, "_schedulers", [scheduler])
    starts = [0, *getattr(scheduler, "_milestones", [0] * len(parts))]  # of the parts of a SequentialLR
    for part, start in zip(parts, starts, strict=False):
        name = type(part).__name__
        if isinstance(part, OneCycleLR) and part.total_steps < updates - start:
            raise ValueError(
                f"`lr_scheduler` is {name} with total_steps={part.total_steps}, and {advice}. It would end in an "
                f"error. Set total_steps to {updates - start} or more."
            )
        length = getattr(part, "T_max" if isinstance(part, CosineAnnealingLR) else "total_iters", updates)
        if part is scheduler and isinstance(part, CosineAnnealingLR | PolynomialLR) and length < updates:
            warnings.warn(
                f"`lr_scheduler` is {name}, whose rate is lowest after {length} steps, and {advice}. Set its length to "
                f"{updates} if the rate is to fall until the end.",
                stacklevel=2,
            )


def _planned_updates(trainer: Trainer, updates_per_rollout: int) -> float:
    """Updates of the whole training, or 0 if its length is not known."""
    rollouts: list[float] = []
    if trainer.max_steps != -1:  # Lightning counts updates, and training steps are whole
        rollouts.append(math.ceil(trainer.max_steps / updates_per_rollout))
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        rollouts.append(trainer.num_training_batches * trainer.max_epochs)
    planned = min(rollouts, default=0)
    return planned * updates_per_rollout if math.isfinite(planned) else 0


def check_rewards(trainer: Trainer, rewards: Sequence[Reward], algorithm: AlgorithmConfig) -> None:
    """Refuse to train with weights that are all 0: every advantage is then 0. A KL term or a loss of its own may train.

    An estimator of its own may too, because it also sees the confidence. Evaluation needs no weight.
    """
    trains = algorithm.kl_coef > 0 or algorithm.own_loss is not None or algorithm.own_estimator is not None
    if trainer.state.fn == "fit" and not trains and not any(reward.weight for reward in rewards):
        raise ValueError(
            f"All weights of `rewards` are 0 ({', '.join(reward.name for reward in rewards)}), so every advantage is 0 "
            "and training would change nothing. Give one of them a weight, or set `algorithm.kl_coef` above 0 or a "
            "loss or estimator of your own."
        )


def check_encoders(trainer: Trainer, rewards: Sequence[Reward]) -> None:
    """Refuse embeddings from sharded weights: each pass is a collective, and ranks may judge unequally often."""
    wanting = [reward.name for reward in rewards if reward.needs_encoder]
    if wanting and is_sharded(trainer.strategy):
        raise ValueError(
            f"The reward {wanting[0]!r} needs embeddings of the frozen policy, which {type(trainer.strategy).__name__} "
            "shards over the ranks. Set the reward's `encoder` to a model that each rank loads whole (the policy's own "
            "hub id, or a small sentence encoder), or use DDP."
        )


def check_trainable(policy: nn.Module) -> None:
    """Refuse a policy without trainable parameters, or with ones of 16 bits.

    A bfloat16 number has 8 significant bits. A weight therefore ignores an update of less than a 512th of itself, which
    at a usual learning rate is nearly every update.
    """
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    narrow = [name for name, parameter in trained.items() if parameter.dtype.itemsize < torch.float32.itemsize]
    if narrow:
        raise ValueError(
            f"{len(narrow)} of {len(trained)} trained tensors are stored in 16 bits ({narrow[0]} is "
            f"{trained[narrow[0]].dtype}), where rounding loses a step of a usual learning rate. Set `policy.dtype: "
            'float32` with Trainer(precision="bf16-mixed"), which still computes in bfloat16, or train an adapter '
            "(`lora`)."
        )
    if not trained:
        raise ValueError(
            "The policy has no trainable parameter, so training would change nothing. Set `lora`, or keep "
            "`requires_grad` on in `build_policy`."
        )


def built(setting: str, factory: Callable[[Any], T], argument: object) -> T:
    """What a factory of the settings makes. Its errors begin with the setting's name, which torch does not know.

    Raises:
        ValueError: in place of the factory's own ``ValueError`` or ``TypeError``.
    """
    try:
        return factory(argument)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{setting}` cannot be built: {error}") from error


def check_scheduler(scheduler: object) -> None:
    """Refuse a schedule that needs a monitored value."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "`lr_scheduler` is ReduceLROnPlateau, which needs a monitored value at every update. Use a schedule that "
            "depends on the update count alone."
        )


def check_mini_batches(mini_batches: int, prompts: int) -> None:
    """Refuse more mini-batches than prompts: some would be empty."""
    if mini_batches > prompts:
        raise ValueError(
            f"`updates_per_rollout` / `epochs_per_rollout` asks for {mini_batches} mini-batches of a global batch of "
            f"{prompts} prompts. Raise `batch_size` or `epochs_per_rollout`, or lower `updates_per_rollout`."
        )


def check_context(model: PreTrainedModel, prompt_length: int, max_new_tokens: int, *, quiet: bool = False) -> None:
    """Refuse prompts that do not fit the model's positions together with their completions.

    Rotary positions continue beyond those that the model was trained with, so for them this only prints a message.

    Args:
        model: its configuration names the number of positions. Without that number there is no limit.
        prompt_length: tokens of the longest prompt.
        max_new_tokens: tokens that may follow it.
        quiet: print no message about rotary positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or prompt_length + max_new_tokens <= positions:
        return
    message = (
        f"A prompt of {prompt_length} tokens and max_new_tokens = {max_new_tokens} more do not fit the {positions} "
        f"positions of {type(model).__name__}. Lower `max_prompt_length` (longer prompts are dropped) or "
        "`max_new_tokens`."
    )
    if not any("Rotary" in type(module).__name__ for module in model.modules()):
        raise ValueError(message)
    if not quiet:
        rank_zero_info(message)


def check_data(
    trainer: Trainer, rewards: Sequence[Reward], model: PreTrainedModel, longest_completion: Callable[[str], int]
) -> None:
    """Refuse data that does not fit the rewards or the model's positions, if it is known beforehand."""
    data = getattr(trainer, "datamodule", None)
    if rows := getattr(data, "train_rows", None):
        check_fields(rewards, rows)
    if trainer.limit_val_batches:
        check_evaluation_data(trainer, rewards, "val")
    for split, length in getattr(data, "longest", {}).items():
        check_context(model, length, longest_completion("train" if split == "train" else "val"))


def check_batch(batch: object) -> None:
    """Refuse what a DataLoader makes of prompts without this package's ``collate_fn``."""
    if not hasattr(batch, "prompts"):
        raise TypeError(
            f"A batch must be a PromptBatch, got {type(batch).__name__}. Give the DataLoader "
            "`collate_fn=PromptCollator(module.tokenizer)`, or use LambdaPODataModule."
        )


def check_reserve(reserve: int, prompts: int) -> int:
    """Number of prompts of a batch to train on. Refuse a reserve of all prompts."""
    if reserve >= prompts:
        raise ValueError(
            f"`rollout.reserve_prompts` is {reserve}, and a batch has {prompts} prompts, so none is left to train on. "
            "Raise `batch_size`, which includes the reserve, or lower `reserve_prompts`."
        )
    return prompts - reserve


def check_fields(rewards: Sequence[Reward], rows: Sequence[Mapping[str, Any]], kind: str = "training") -> None:
    """Refuse a training set in which no row has a field or column that a reward needs. Empty text counts as none.

    Raises:
        TypeError: a reward function takes a column that the data has not.
        ValueError: naming the reward and the missing field.
    """
    if functions := [reward for reward in rewards if isinstance(reward, FunctionReward)]:
        columns = list(dict.fromkeys(name for row in rows for name in row if name not in ROW_FIELDS))
        for function in functions:
            function.check_columns(columns)
    for reward in rewards:
        for field in reward.requires:
            if not _has(rows, field):
                raise ValueError(
                    f"The reward {reward.name!r} needs {field}, and none of the {len(rows)} {kind} rows has one. Map "
                    f"the column that has them (`columns: {{{field.removesuffix('s')}: ...}}`), or drop the reward."
                )


def check_evaluation_data(trainer: Trainer, rewards: Sequence[Reward], split: str) -> None:
    """Refuse validation or test data that no reward can judge, of those that need a field at all.

    A reward may be without its field here, such as a density on a test set without solutions, if another one has its
    own. Without answers a warning says what is not logged.
    """
    find = getattr(getattr(trainer, "datamodule", None), "rows_of", None)
    rows = find(split) if callable(find) else []
    needing = [reward for reward in rewards if reward.requires]
    lacking = [reward for reward in needing if rows and not all(_has(rows, field) for field in reward.requires)]
    kind = {"val": "validation"}.get(split, split)
    if lacking and len(lacking) == len(needing):
        check_fields(lacking[:1], rows, kind)
    voters = [reward for reward in needing if reward.name == "accuracy" and "answers" in reward.requires]
    if rows and voters and not _has(rows, "answers"):
        rank_zero_warn(
            f"None of the {len(rows)} {kind} rows has an answer, so accuracy, pass@k and maj@k are not logged. Map the "
            "column that has them (`columns: {answer: ...}`)."
        )


def _has(rows: Sequence[Mapping[str, Any]], field: str) -> bool:
    values = (row.get(field.removesuffix("s")) for row in rows)
    return any(value is not None and str(value).strip() for value in values)
