"""What training steps, validation and test measure: rewards, density, accuracy in the field's forms, groups."""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_lambdapo.config import AlgorithmConfig, EvaluationConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout, Scores
from lightning_lambdapo.metrics import GroupDiagnostics, MajorityAtK, PassAtK, SemanticDensity
from lightning_lambdapo.policy import PolicyConfig
from lightning_lambdapo.results import Outcome, changed_settings, outcome
from lightning_lambdapo.rewards import Reward, RewardInputs, SemanticDensityReward, score
from lightning_lambdapo.seeding import step_randomness
from lightning_lambdapo.tally import Tally

M = TypeVar("M", bound=Metric)
_PROGRESS_BAR = ("reward", "accuracy", "density_f")


def tally_rollout(tally: Tally, rollout: Rollout, scores: Scores) -> None:
    """Tally what training and evaluation report alike: rewards over applicable rows, lengths, entropy."""
    tally.mean_and_std("reward", scores.total[scores.valid])
    for name, part in scores.parts.items():
        tally.mean_and_std(f"reward/{name}", part[~part.isnan()])
    tally.mean("completion_length", rollout.lengths)
    tally.maximum("completion_length_max", rollout.lengths)
    tally.mean("truncated", rollout.truncated)
    tally.mean("valid", scores.valid)
    tally.mean("entropy", rollout.entropy[rollout.completion_mask])


def judge(
    rewards: Sequence[Reward],
    batch: PromptBatch,
    rollout: Rollout,
    *,
    mask_truncated: bool = False,
    tally: Tally | None = None,
) -> Scores:
    """Let every reward judge every completion, and tally what the rewards say of their call.

    Rows sampled from logits that were not finite are invalid, with ``mask_truncated`` truncated ones too.
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
    scores = score(rewards, inputs, group_size=group_size, device=rollout.completion_ids.device)
    if tally is not None:
        for reward in rewards:
            for key, value in reward.statistics().items():
                tally.ratio(f"reward/{reward.name}/{key}", value, 1.0)
    usable = rollout.finite & ~rollout.truncated if mask_truncated else rollout.finite
    return dataclasses.replace(scores, valid=scores.valid & usable.view_as(scores.valid))


def prompt_outcomes(batch: PromptBatch, rollout: Rollout, scores: Scores, votes: Sequence[str | None]) -> list[Outcome]:
    """What came of each prompt of a batch, for reports; ``votes`` are the rows' final answers."""
    parts = {name: part.tolist() for name, part in scores.parts.items()}
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


class StepReport(nn.Module):
    """What a training step reports beyond its learning pass: rewards, density, and what the advantage saw.

    Args:
        algorithm: weighting and temperature of the pairs.
        rewards: ``density_*`` has the settings of the density reward, where there is one that counts tokens. It is
            ROUGE-L otherwise, next to a reward of ``kind="embedding"`` too, whose own mean is ``reward/<name>``.
    """

    def __init__(self, algorithm: AlgorithmConfig, rewards: Sequence[Reward]) -> None:
        super().__init__()
        self.density = _density_metric(rewards)
        self.groups = GroupDiagnostics(
            weighting=algorithm.weighting if algorithm.estimator == "lambda" else None,
            temperature=algorithm.temperature,
        )
        self.names: set[str] = set()

    def update(
        self,
        batch: PromptBatch,
        rollout: Rollout,
        scores: Scores,
        policy_scores: Tensor,
        advantages: Tensor,
        tally: Tally,
    ) -> None:
        """Take in the step's rollout; ``policy_scores`` is ``(B, G)``, ``advantages`` ``(N,)``.

        Sums and counts go to ``tally``, which is to be finished with.
        """
        shape = scores.total.shape
        tally_rollout(tally, rollout, scores)
        if "accuracy" in scores.parts:
            accuracy = scores.parts["accuracy"]
            tally.mean("accuracy", accuracy[~accuracy.isnan()] > 0.5)
        self.density.update(rollout.texts, [text for text in batch.references for _ in range(shape[1])])
        self.groups.update(
            scores.total, policy_scores, advantages.view(shape), rollout.lengths.view(shape), scores.valid
        )

    def finish(self, tally: Tally) -> dict[str, float]:
        """All of the step's statistics with those of ``tally``, over all ranks; starts anew. A collective."""
        values = tally.reduce()
        values |= {name: float(value) for name, value in self.groups.compute().items()}
        values |= {f"density_{name}": float(value) for name, value in self.density.compute().items()}
        self.groups.reset()
        self.density.reset()
        return values

    def log(self, module: LightningModule, values: Mapping[str, float], **settings: Any) -> None:
        """Log a step's values under ``train/``, ``settings`` as for ``LightningModule.log``.

        What has no value this time is left out; Lightning alone would log its last value again.
        """
        trainer = module.trainer
        for name in self.names - values.keys():
            if trainer._results is not None:
                trainer._results.pop(f"training_step.train/{name}", None)
            for metrics in (trainer.callback_metrics, trainer.logged_metrics):
                metrics.pop(f"train/{name}", None)
        self.names |= values.keys()
        for name, value in values.items():
            module.log(f"train/{name}", value, prog_bar=name in _PROGRESS_BAR, **settings)


class Evaluation(nn.Module):
    """The metrics of one evaluation stage; all states add up over ranks.

    Accuracy (avg@n, pass@k, maj@k) needs the reward called ``accuracy``; prompts with a row it does not apply to are
    left out.

    Args:
        config: ``k`` and the number of samples.
        rewards: the judges; the one called ``accuracy`` reads the votes of maj@k.
    """

    def __init__(self, config: EvaluationConfig, rewards: Sequence[Reward]) -> None:
        super().__init__()
        self.num_samples = config.num_samples
        self.voter = next((reward for reward in rewards if reward.name == "accuracy"), None)
        self.density = _density_metric(rewards)
        self.pass_at = nn.ModuleList(PassAtK(k) for k in config.k)
        self.majority_at = nn.ModuleList(MajorityAtK(k) for k in config.k if k > 1)
        self.tally = Tally()

    def update(self, batch: PromptBatch, rollout: Rollout, scores: Scores) -> list[Outcome]:
        """Take in one batch of prompts with ``n`` completions each; returns what came of each prompt."""
        tally_rollout(self.tally, rollout, scores)
        samples = self.num_samples
        self.density.update(rollout.texts, [text for text in batch.references for _ in range(samples)])
        accuracy = scores.parts.get("accuracy", torch.full_like(scores.total, torch.nan))
        judged = ~accuracy.isnan().any(-1)
        correct = accuracy[judged] > 0.5
        self.tally.mean(f"avg_at_{samples}", correct)
        votes = [self.voter.vote(text) if self.voter else None for text in rollout.texts]
        chosen = [list(votes[i * samples : (i + 1) * samples]) for i in judged.nonzero().flatten().tolist()]
        for pass_at in self._metrics(PassAtK):
            pass_at.update(correct)
        for majority_at in self._metrics(MajorityAtK):
            majority_at.update(chosen, correct)
        return prompt_outcomes(batch, rollout, scores, votes)

    def compute(self) -> dict[str, float]:
        """All statistics that have data, over all ranks; a collective."""
        values = self.tally.reduce()
        values |= {f"pass_at_{metric.k}": float(metric.compute()) for metric in self._metrics(PassAtK)}
        values |= {f"maj_at_{metric.k}": float(metric.compute()) for metric in self._metrics(MajorityAtK)}
        values |= {f"density_{name}": float(value) for name, value in self.density.compute().items()}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def reset(self) -> None:
        """Forget everything."""
        self.tally = Tally()
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def _metrics(self, kind: type[M]) -> list[M]:
        return [module for module in self.modules() if isinstance(module, kind)]


class EvaluationSteps(LightningModule):
    """The validation and test loops of a module that has ``evaluations``, ``rewards`` and ``sample``."""

    evaluations: nn.ModuleDict
    rewards: list[Reward]
    policy_config: PolicyConfig
    validation_config: EvaluationConfig

    @property
    @abstractmethod
    def sampling_seed(self) -> int:
        """Seed of the sampling streams."""

    @abstractmethod
    def longest_completion(self, stage: str) -> int:
        """Most new tokens of a completion."""

    @abstractmethod
    def sample(self, batch: PromptBatch, stage: str) -> Rollout:
        """Complete each prompt."""

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample with ``validation``'s own settings and measure; callbacks get all of it."""
        return self._evaluate(batch, "val", batch_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """The same for the test set."""
        return self._evaluate(batch, "test", batch_idx)

    def evaluation_settings(self) -> dict[str, Any]:
        """What the results of validation and test depend on, as plain data for a report."""
        sampling = self.validation_config.sampling
        drawn = {"temperature": sampling.temperature, **changed_settings(sampling)}
        policy = changed_settings(self.policy_config)
        accuracy = next((reward for reward in self.rewards if reward.name == "accuracy"), None)
        return {
            "model": policy.pop("model", None),
            "policy": policy,
            "k": list(self.validation_config.k),
            "decoding": ({"greedy": True} if sampling.greedy else drawn)
            | {"max_new_tokens": self.longest_completion("test")},
            "seed": self.sampling_seed,
            "answer_format": getattr(accuracy, "answer_format", None),
        }

    def on_validation_epoch_start(self) -> None:
        """Start the metrics anew: states made in an earlier inference mode could not be written to now."""
        self._evaluation("val").reset()

    def on_test_epoch_start(self) -> None:
        """The same for the test set."""
        self._evaluation("test").reset()

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``."""
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._finish_evaluation("test")

    def _evaluate(self, batch: PromptBatch, stage: str, batch_idx: int) -> dict[str, Any]:
        with step_randomness(self.sampling_seed, batch_idx):  # a function of the batch: evaluations repeat
            rollout = self.sample(batch, stage)
            if not batch.prompts:  # the last batch of all, which other ranks have a prompt of
                return {"outcomes": []}
            scores = judge(self.rewards, batch, rollout)
            outcomes = self._evaluation(stage).update(batch, rollout, scores)
        return {"batch": batch, "rollout": rollout, "scores": scores, "outcomes": outcomes}

    def _finish_evaluation(self, stage: str) -> None:
        for name, value in self._evaluation(stage).compute().items():
            # The same on every rank already; `sync_dist` says so to Lightning.
            self.log(f"{stage}/{name}", value, prog_bar=name in ("reward", "pass_at_1"), sync_dist=True)

    def _evaluation(self, stage: str) -> Evaluation:
        return cast(Evaluation, self.evaluations[stage])


def _density_metric(rewards: Sequence[Reward]) -> SemanticDensity:
    """A density metric with the settings of the first density reward that counts tokens; ROUGE-L without one.

    A reward of ``kind="embedding"`` says nothing here: its own mean is logged as ``reward/<name>``.
    """
    for reward in rewards:
        if isinstance(reward, SemanticDensityReward) and reward.kind != "embedding":
            return SemanticDensity(kind=reward.kind, n=reward.n, beta=reward.beta, tokenizer=reward.tokenizer)
    return SemanticDensity()
