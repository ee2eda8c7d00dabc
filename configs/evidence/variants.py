"""What was tried against LambdaPO and GRPO: advantages, a schedule of density, and an optimizer of equal updates.

Each advantage is a function of rewards, confidence and valid rows, ``(B, G)`` each, as ``algorithm.estimator`` takes:

    PYTHONPATH=configs/evidence lambdapo compare --estimators lambda,grpo,variants.win_rate ...
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_lambdapo.callbacks import finished_rollouts
from lightning_lambdapo.functional import group_advantages, lambda_advantages, pairwise_weights


def differences(rewards: Tensor) -> Tensor:
    """``R_i - R_j``, ``(B, G, G)``."""
    return rewards.unsqueeze(2) - rewards.unsqueeze(1)


def mean_over_peers(pairs: Tensor, valid: Tensor) -> Tensor:
    """``1/(G-1) * sum over j`` of ``(B, G, G)`` over valid peers. The diagonal must be 0."""
    both = valid.unsqueeze(2) & valid.unsqueeze(1)
    return (pairs * both).sum(2) / (valid.sum(1, keepdim=True) - 1).clamp(min=1)


def confidence_weights(confidence: Tensor, valid: Tensor) -> Tensor:
    """``sigmoid(d_ij)``: the policy's probability that i is preferred to j."""
    return pairwise_weights(torch.zeros_like(confidence), confidence, valid=valid)


def win_rate(rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """Share of peers that a row beats, minus the share that beat it: the size of a difference does not count."""
    return mean_over_peers(differences(rewards).sign(), valid)


def rank_gap(rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """A pair counts by the distance of its ranks: ``w_ij = |rank_i - rank_j| / (G-1)``, ties at their mean rank."""
    below = ((rewards.unsqueeze(2) > rewards.unsqueeze(1)) & valid.unsqueeze(1)).sum(2)
    level = ((rewards.unsqueeze(2) == rewards.unsqueeze(1)) & valid.unsqueeze(1)).sum(2)
    rank = below + level / 2
    gap = (rank.unsqueeze(2) - rank.unsqueeze(1)).abs()
    return mean_over_peers(gap / (rewards.shape[1] - 1) * differences(rewards), valid)


def undecided(rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """A pair counts by the policy's doubt about it: ``w_ij = 4 p_ij (1 - p_ij)`` with ``p_ij = sigmoid(d_ij)``."""
    share = confidence_weights(confidence, valid)
    return mean_over_peers(4 * share * (1 - share) * differences(rewards), valid)


def optimistic(rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """Wins weighted by confidence, losses by half: what is likely and better rises more than what is worse falls."""
    gains = differences(rewards)
    return mean_over_peers(confidence_weights(confidence, valid).where(gains > 0, 0.5) * gains, valid)


def rare_first(rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """RLOO in which a row counts by how unlikely it is in its group: ``A_i = (1 - q_i) * RLOO_i``.

    ``q`` is the softmax of the confidence in units of its standard deviation, as in ``group_std``.
    """
    spread = torch.stack([c[v].std(correction=0) for c, v in zip(confidence, valid, strict=True)]).clamp(min=1e-6)
    share = (confidence / spread[:, None]).masked_fill(~valid, -torch.inf).softmax(1)
    return (1 - share) * group_advantages(rewards, estimator="rloo", valid=valid)


def best_peer(rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """What a row adds to the best of its group: ``max(R) - max of the others``, and nothing for all but the best."""
    filled = rewards.masked_fill(~valid, -torch.inf)
    best, second = filled.topk(2, dim=1).values.unsqueeze(2).unbind(1)
    several = valid.sum(1, keepdim=True) > 1
    return torch.where((filled == best) & valid & several, best - second, 0.0)


class Annealed:
    """Confidence weights at first, uniform ones of the same mean after ``steps`` calls.

    ``w = (1 - a) sigmoid(d) + a / 2`` with ``a = min(1, calls / steps)``. A resumed run begins anew.
    """

    def __init__(self, steps: int = 60) -> None:
        self.steps = steps
        self.calls = 0

    def __call__(self, rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
        """Advantages of one step."""
        share = min(1.0, self.calls / self.steps)
        self.calls += 1
        confident = lambda_advantages(rewards, confidence, valid=valid)
        return (1 - share) * confident + share / 2 * group_advantages(rewards, estimator="rloo", valid=valid)


class WeightSchedule(Callback):
    """Changes a reward's weight from ``start`` to ``end``, in equal parts over ``steps`` rollouts.

    Args:
        reward: the reward's name.
        start: its weight in the first rollout.
        end: its weight after ``steps`` rollouts.
        steps: how many.
    """

    def __init__(self, reward: str = "semantic_density", start: float = 1.0, end: float = 0.0, steps: int = 60) -> None:
        self.reward, self.start, self.end, self.steps = reward, start, end, steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the weight of this rollout."""
        share = min(1.0, finished_rollouts(trainer) / self.steps)
        rewards: Any = pl_module.rewards
        (chosen,) = (each for each in rewards if each.name == self.reward)
        chosen.weight = self.start + share * (self.end - self.start)


class FixedNormAdamW(torch.optim.AdamW):
    """AdamW whose every update is scaled to the length ``norm``, so that all estimators move equally far.

    The learning rate then matters only by its schedule: an update has the length ``norm * lr / initial_lr``.
    """

    def __init__(self, params: Any, norm: float, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.norm = norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One update."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        before = [weight.clone() for weight in weights]
        loss = super().step(closure)
        length = torch.stack([(new - old).double().square().sum() for new, old in zip(weights, before, strict=True)])
        group = self.param_groups[0]
        wanted = self.norm * group["lr"] / group.get("initial_lr", group["lr"])
        scale = wanted / length.sum().sqrt() if length.any() else 0.0
        for new, old in zip(weights, before, strict=True):
            new.copy_(old + (new - old) * scale)
        return loss
