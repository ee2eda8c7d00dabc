"""Validation and test: judging and metrics."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torchmetrics import Metric

from lightning_lambdapo.checks import check_evaluation_data
from lightning_lambdapo.config import EvaluationConfig, PolicyConfig, changed_settings
from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.evaluation.judging import judge_rollout, prepare_references
from lightning_lambdapo.evaluation.metrics import MajorityAtK, PassAtK, SemanticDensity
from lightning_lambdapo.evaluation.results import Outcome, outcome
from lightning_lambdapo.rewards import Reward, SemanticDensityReward

M = TypeVar("M", bound=Metric)


PROGRESS_BAR = ("reward", "accuracy", "density_f")


def tally_rollout(tally: Tally, rollout: Rollout, rewards: RewardOutcome) -> None:
    """Tally what both training and evaluation log: rewards over applicable rows, lengths, entropy if it is known."""
    tally.mean_and_std("reward", rewards.total[rewards.valid])
    for name, part in rewards.parts.items():
        tally.mean_and_std(f"reward/{name}", part[~part.isnan()])
    tally.mean("completion_length", rollout.lengths)
    tally.maximum("completion_length_max", rollout.lengths)
    tally.mean("truncated", rollout.truncated)
    tally.mean("valid", rewards.valid)
    if rollout.entropy is not None:
        tally.mean("entropy", rollout.entropy[rollout.completion_mask])


def prompt_outcomes(
    batch: PromptBatch, rollout: Rollout, rewards: RewardOutcome, votes: Sequence[str | None]
) -> list[Outcome]:
    """The outcome of each prompt of a batch, for reports. ``votes`` are the rows' final answers."""
    parts = {name: part.tolist() for name, part in rewards.parts.items()}
    samples = len(rollout.texts) // len(batch.prompts)
    lengths, truncated = rollout.lengths.view(-1, samples).tolist(), rollout.truncated.view(-1, samples).tolist()
    return [
        outcome(
            prompt_id,
            subject=batch.columns[index].get("subject"),
            parts={name: part[index] for name, part in parts.items()},
            votes=votes[index * samples : (index + 1) * samples],
            lengths=lengths[index],
            truncated=truncated[index],
        )
        for index, prompt_id in enumerate(batch.prompt_ids.tolist())
    ]


class Evaluation(nn.Module):
    """The metrics of one evaluation stage. All states add up over ranks.

    Accuracy (avg@n, pass@k, maj@k) needs the reward called ``accuracy``. A prompt is omitted if that reward does not
    apply to one of its rows.

    Args:
        config: ``k`` and the number of samples.
        rewards: the judges. The one called ``accuracy`` reads the votes of maj@k.
    """

    def __init__(self, config: EvaluationConfig, rewards: Sequence[Reward]) -> None:
        super().__init__()
        self.num_samples = config.num_samples
        self.voter = next((reward for reward in rewards if reward.name == "accuracy"), None)
        self.density = density_metric(rewards)
        self.pass_at = nn.ModuleList(PassAtK(k) for k in config.k)
        self.majority_at = nn.ModuleList(MajorityAtK(k) for k in config.k if k > 1)
        self.tally = Tally()

    def update(self, batch: PromptBatch, rollout: Rollout, rewards: RewardOutcome) -> list[Outcome]:
        """Add one batch of prompts with ``n`` completions each. Returns the outcome of each prompt."""
        tally_rollout(self.tally, rollout, rewards)
        samples = self.num_samples
        self.density.update(rollout.texts, [text or None for text in batch.references for _ in range(samples)])
        accuracy = rewards.parts.get("accuracy", torch.full_like(rewards.total, torch.nan))
        judged = ~accuracy.isnan().any(-1)
        correct = accuracy[judged] > 0.5
        self.tally.mean(f"avg_at_{samples}", correct)
        votes = [self.voter.vote(text) if self.voter else None for text in rollout.texts]
        chosen = [list(votes[i * samples : (i + 1) * samples]) for i in judged.nonzero().flatten().tolist()]
        for pass_at in self._metrics(PassAtK):
            pass_at.update(correct)
        for majority_at in self._metrics(MajorityAtK):
            majority_at.update(chosen, correct)
        return prompt_outcomes(batch, rollout, rewards, votes)

    def compute(self) -> dict[str, float]:
        """All statistics that have data, over all ranks. A collective."""
        at_k = {f"pass_at_{metric.k}": float(metric.compute()) for metric in self._metrics(PassAtK)}
        at_k |= {f"maj_at_{metric.k}": float(metric.compute()) for metric in self._metrics(MajorityAtK)}
        values = self.tally.reduce() | {name: value for name, value in at_k.items() if not math.isnan(value)}
        return values | {f"density_{name}": float(value) for name, value in self.density.compute().items()}

    def reset(self) -> None:
        """Reset all metrics."""
        self.tally = Tally()
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def _metrics(self, kind: type[M]) -> list[M]:
        return [module for module in self.modules() if isinstance(module, kind)]


class Evaluator(nn.Module):
    """Judges and measures validation and test.

    Args:
        config: how validation and test decode.
        rewards: the judges.
    """

    def __init__(self, config: EvaluationConfig, rewards: Sequence[Reward]) -> None:
        super().__init__()
        self.config = config
        self.rewards = list(rewards)
        self.stages = nn.ModuleDict({stage: Evaluation(config, rewards) for stage in ("val", "test")})

    def start(self, stage: str, trainer: Trainer) -> None:
        """Reset the metrics, because states made in an earlier inference mode cannot be written to.

        Outside of training, the data is checked here, and rewards that need the references of the training set receive
        them.
        """
        if trainer.state.fn != "fit":
            check_evaluation_data(trainer, self.rewards, stage)
            prepare_references(self.rewards, trainer)
        evaluation = self._stage(stage)
        evaluation.reset()
        evaluation.density.token_weights = density_metric(self.rewards).token_weights

    def judge(self, batch: PromptBatch, rollout: Rollout, stage: str) -> dict[str, Any]:
        """Judge and measure one batch. Returns what callbacks receive."""
        if not batch.prompts:  # the last batch, of which only other ranks have a prompt
            return {"outcomes": []}
        rewards = judge_rollout(self.rewards, batch, rollout)
        outcomes = self._stage(stage).update(batch, rollout, rewards)
        # "scores" is the name of release 0.1.
        return {"batch": batch, "rollout": rollout, "rewards": rewards, "scores": rewards, "outcomes": outcomes}

    def log(self, module: LightningModule, stage: str) -> None:
        """Log ``val/...`` or ``test/...``. A collective."""
        for name, value in self._stage(stage).compute().items():
            # The value is the same on every rank. `sync_dist` only tells Lightning so.
            module.log(f"{stage}/{name}", value, prog_bar=name in ("reward", "pass_at_1"), sync_dist=True)

    def settings(self, policy: PolicyConfig, *, max_new_tokens: int, seed: int) -> dict[str, Any]:
        """Everything that the results depend on, as plain data for a report."""
        sampling = self.config.sampling
        drawn = {"temperature": sampling.temperature, **changed_settings(sampling)}
        changed = changed_settings(policy)
        return {
            "model": changed.pop("model", None),
            "policy": changed,
            "k": list(self.config.k),
            "decoding": ({"greedy": True} if sampling.greedy else drawn) | {"max_new_tokens": max_new_tokens},
            "seed": seed,
            "answer_format": getattr(self._stage("val").voter, "answer_format", None),
        }

    def _stage(self, stage: str) -> Evaluation:
        return cast(Evaluation, self.stages[stage])


def density_metric(rewards: Sequence[Reward]) -> SemanticDensity:
    """A density metric with the settings of the first density reward that counts tokens, or else ROUGE-L.

    A reward of ``kind="embedding"`` does not count: its own mean is logged as ``reward/<name>``.
    """
    for reward in rewards:
        if isinstance(reward, SemanticDensityReward) and reward.kind != "embedding":
            return SemanticDensity(
                kind=reward.kind,
                n=reward.n,
                beta=reward.beta,
                tokenizer=reward.tokenizer,
                token_weights=reward.weights,
            )
    return SemanticDensity()
