"""What a training step logs outside its learning pass: rewards, density, group statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lambdapo.config import AlgorithmConfig
from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed.lightning_internals import forget_logged
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.evaluation.evaluator import PROGRESS_BAR, density_metric, tally_rollout
from lightning_lambdapo.evaluation.metrics import GroupDiagnostics
from lightning_lambdapo.rewards import Reward

_UNUSABLE_ROLLOUTS = 3


class TrainingLog(nn.Module):
    """What a training step logs outside its learning pass: rewards, density, group statistics.

    Args:
        algorithm: weighting and temperature of the pairs.
        rewards: ``density_*`` uses the settings of the density reward that counts tokens, if there is one. Otherwise
            it is ROUGE-L, also with a reward of ``kind="embedding"``, whose own mean is ``reward/<name>``.
    """

    def __init__(self, algorithm: AlgorithmConfig, rewards: Sequence[Reward]) -> None:
        super().__init__()
        self.density = density_metric(rewards)
        self.groups = GroupDiagnostics(
            weighting=algorithm.weighting if algorithm.estimator == "lambda" else None,
            temperature=algorithm.temperature,
        )
        self.names: set[str] = set()
        self._unusable = 0

    def update(
        self,
        batch: PromptBatch,
        rollout: Rollout,
        rewards: RewardOutcome,
        confidence: Tensor,
        advantages: Tensor,
        tally: Tally,
    ) -> None:
        """Add the step's rollout. ``confidence`` is ``(B, G)``, ``advantages`` ``(N,)``.

        Sums and counts go to ``tally``. Pass it to :meth:`finish` too.
        """
        shape = rewards.total.shape
        tally_rollout(tally, rollout, rewards)
        if "accuracy" in rewards.parts:
            accuracy = rewards.parts["accuracy"]
            tally.mean("accuracy", accuracy[~accuracy.isnan()] > 0.5)
        self.density.update(rollout.texts, [text for text in batch.references for _ in range(shape[1])])
        self.groups.update(
            rewards.total, confidence, advantages.view(shape), rollout.lengths.view(shape), rewards.valid
        )

    def finish(self, tally: Tally) -> dict[str, float]:
        """The step's statistics and those of ``tally``, over all ranks, and a reset. A collective.

        Warns when no row of three rollouts in a row had a usable reward.
        """
        values = tally.reduce()
        values |= {name: float(value) for name, value in self.groups.compute().items()}
        values |= {f"density_{name}": float(value) for name, value in self.density.compute().items()}
        self.groups.reset()
        self.density.reset()
        self._unusable = self._unusable + 1 if values.get("valid") == 0.0 else 0
        if self._unusable == _UNUSABLE_ROLLOUTS:
            rank_zero_warn(
                f"No completion of the last {_UNUSABLE_ROLLOUTS} rollouts had a usable reward, so nothing was learnt. "
                "Either every reward returned None for all of them (do the rows have the `answer` or `reference` that "
                "the rewards need?), or all were cut off at `rollout.max_new_tokens` and `algorithm.mask_truncated` "
                "leaves those out, or their log-probabilities are not finite."
            )
        return values

    def log(self, module: LightningModule, values: Mapping[str, float], **settings: Any) -> None:
        """Log a step's values under ``train/``, with ``settings`` as for ``LightningModule.log``.

        Names without a value in this step are omitted. Lightning alone would log their last value again.
        """
        for name in self.names - values.keys():
            forget_logged(module.trainer, f"train/{name}")
        self.names |= values.keys()
        for name, value in values.items():
            module.log(f"train/{name}", value, prog_bar=name in PROGRESS_BAR, **settings)
