"""Judging the completions of a rollout with all rewards."""

import dataclasses
from collections.abc import Sequence

from lightning.pytorch import Trainer

from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.rewards import Reward, RewardInputs, judge


def judge_rollout(
    rewards: Sequence[Reward],
    batch: PromptBatch,
    rollout: Rollout,
    *,
    mask_truncated: bool = False,
    tally: Tally | None = None,
) -> RewardOutcome:
    """Let every reward judge every completion, and tally the rewards' own statistics.

    Rows sampled from logits that were not finite are invalid. With ``mask_truncated`` truncated rows are invalid too.
    """
    group_size = len(rollout.texts) // len(batch.prompts)
    owner = [index for index in range(len(batch.prompts)) for _ in range(group_size)]
    inputs = RewardInputs(
        prompts=[batch.prompts[i] for i in owner],
        completions=rollout.texts,
        answers=[batch.answers[i] for i in owner],
        references=[batch.references[i] for i in owner],
        completion_lengths=rollout.lengths.tolist(),
        truncated=rollout.truncated.tolist(),
        columns=[batch.columns[i] for i in owner],
    )
    outcome = judge(rewards, inputs, group_size=group_size, device=rollout.completion_ids.device)
    if tally is not None:
        for reward in rewards:
            for key, value in reward.statistics().items():
                tally.ratio(f"reward/{reward.name}/{key}", value, 1.0)
    usable = rollout.finite & ~rollout.truncated if mask_truncated else rollout.finite
    return dataclasses.replace(outcome, valid=outcome.valid & usable.view_as(outcome.valid))


def prepare_references(rewards: Sequence[Reward], trainer: Trainer) -> None:
    """Give each reward that needs them the references of the training set.

    Every rank reads the whole training set, so all ranks give the same ones.

    Args:
        rewards: the judges.
        trainer: its DataModule, if it has one with a method ``training_references``, knows them.

    Raises:
        ValueError: a reward cannot judge without, and there are none.
    """
    wanting = [reward for reward in rewards if reward.needs_training_references]
    if not wanting:
        return
    find = getattr(getattr(trainer, "datamodule", None), "training_references", None)
    references = None if find is None else find()
    for reward in wanting:
        reward.prepare_references(references)
