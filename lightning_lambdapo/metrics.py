"""torchmetrics of reasoning reinforcement learning; every state is a sum, so ranks reduce exactly."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lambdapo.functional import pairwise_weights, reasoning_trace, tokenize
from lightning_lambdapo.functional.advantages import Temperature, Weighting
from lightning_lambdapo.functional.semantic_density import (
    Kind,
    _density_compute,
    _density_update,
    check_density_settings,
)

_BINS = 1000
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class SemanticDensity(Metric):
    """Mean precision, recall and F of reasoning traces against reference solutions.

    See :func:`~lightning_lambdapo.functional.semantic_density`. Both texts are cut before their last final-answer
    marker and tokenised alike.

    Args:
        kind: ``"token"`` (clipped n-gram overlap) or ``"rouge_l"``.
        n: length of the n-grams.
        beta: weight of recall against precision.
        tokenizer: text -> tokens, for both texts.
        **kwargs: as for ``torchmetrics.Metric``.

    Example:
        >>> metric = SemanticDensity()
        >>> metric.update(["2 + 2 = 4 #### 4"], ["2 + 2 = 4, so #### 4"])
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'precision': 1.0, 'recall': 0.7143, 'f': 0.8333}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor
    rows: Tensor

    def __init__(
        self,
        kind: Kind = "rouge_l",
        n: int = 1,
        beta: float = 1.0,
        tokenizer: Callable[[str], Sequence[str]] = tokenize,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_density_settings(kind=kind, n=n, beta=beta)
        self.kind = kind
        self.n = n
        self.beta = beta
        self.tokenizer = tokenizer
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, generated: Sequence[str], references: Sequence[str | None]) -> None:
        """Take in texts and their references; a row whose reference is None is skipped."""
        if len(generated) != len(references):
            raise ValueError(f"{len(generated)} generated texts have {len(references)} references; give one each.")
        tokens = {text: self.tokenizer(reasoning_trace(text)) for text in {*references} if text is not None}
        for text, reference in zip(generated, references, strict=True):
            if reference is not None:
                counts = _density_update(
                    self.tokenizer(reasoning_trace(text)), tokens[reference], kind=self.kind, n=self.n
                )
                self.sums += torch.tensor(_density_compute(*counts, beta=self.beta)).to(self.sums)
                self.rows += 1

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall`` and ``f``; empty without data."""
        if self.rows == 0:
            return {}
        means = (self.sums / self.rows).float()
        return dict(zip(("precision", "recall", "f"), means, strict=True))


class PassAtK(Metric):
    r"""Unbiased pass@k: the probability that at least one of ``k`` samples is correct.

    .. math:: 1 - \binom{n - c}{k} / \binom{n}{k}

    for ``c`` correct of ``n`` samples, averaged over prompts. Source: Chen et al. 2021, arXiv 2107.03374.

    Args:
        k: number of samples.
        **kwargs: as for ``torchmetrics.Metric``.

    Example:
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([[True, False, False, False]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    prompts: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        self.k = k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """Take in ``(B, n)`` bool, ``n`` at least ``k``."""
        _check_samples(correct, self.k)
        n = correct.shape[1]
        for right in correct.sum(-1).tolist():
            # A product of ratios, each in [0, 1]: no binomial coefficient to overflow.
            self.total += 1 - math.prod(max(n - right - i, 0) / (n - i) for i in range(self.k))
        self.prompts += len(correct)

    def compute(self) -> Tensor:
        """Mean over prompts; NaN without data."""
        return (self.total / self.prompts).float()


class MajorityAtK(Metric):
    """maj@k: the share of prompts whose most frequent answer among the first ``k`` samples is correct.

    None does not vote; a tie goes to the answer that came first; without a vote the prompt counts as wrong. Source:
    self-consistency, Wang et al. 2022, arXiv 2203.11171.

    Args:
        k: number of samples that vote.
        **kwargs: as for ``torchmetrics.Metric``.

    Example:
        >>> metric = MajorityAtK(k=3)
        >>> metric.update([["7", "9", "9"]], torch.tensor([[False, True, True]]))
        >>> metric.compute()
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    prompts: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        self.k = k
        self.add_state("right", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, votes: Sequence[Sequence[str | None]], correct: Tensor) -> None:
        """Take in each prompt's ``n`` answers and which of them are correct, ``(B, n)`` bool."""
        _check_samples(correct, self.k)
        if [len(row) for row in votes] != [correct.shape[1]] * len(correct):
            raise ValueError(f"`votes` must hold {len(correct)} rows of {correct.shape[1]} answers, as `correct` does.")
        for answers, flags in zip(votes, correct.tolist(), strict=True):
            ballots = Counter(answer for answer in answers[: self.k] if answer is not None)
            if ballots:  # most_common keeps the order of first appearance among equals
                winner = ballots.most_common(1)[0][0]
                self.right += int(flags[answers.index(winner)])
        self.prompts += len(correct)

    def compute(self) -> Tensor:
        """Mean over prompts; NaN without data."""
        return (self.right / self.prompts).float()


class GroupDiagnostics(Metric):
    """What the pairwise advantage sees: weights, ranking, balance, length.

    ``compute`` gives, as far as there is data: ``weight_q05`` ... ``weight_q95``, quantiles of the pair weights (from
    a histogram of 1,000 bins over [0, 1]: exact to 0.001); ``weight_extreme_share``, the share outside [0.05, 0.95];
    ``group_auc``, the share of pairs with :math:`R_i > R_j` that the policy already ranks right, ties half;
    ``group_advantage_sum``, mean over groups with at least two valid rows; ``advantage_length_correlation``, Pearson's
    over valid rows; ``equal_reward_share``, the share of groups whose valid rewards are all equal.

    Args:
        weighting: of the pairs; None (a baseline estimator) leaves the weights out.
        temperature: of the pairs.
        **kwargs: as for ``torchmetrics.Metric``.

    Example:
        >>> metric = GroupDiagnostics(weighting="confidence", temperature=1.0)
        >>> row = torch.tensor([[1.0, 0.0]])
        >>> metric.update(row, scores=row, advantages=row - 0.5, lengths=row + 4, valid=row >= 0)
        >>> round(metric.compute()["group_auc"].item(), 4)
        1.0
    """

    is_differentiable = False
    full_state_update = False
    histogram: Tensor
    extreme: Tensor
    ordered: Tensor
    groups: Tensor
    moments: Tensor

    def __init__(self, weighting: Weighting | None, temperature: Temperature, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weighting = weighting
        self.temperature = temperature
        self.add_state("histogram", torch.zeros(_BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("extreme", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # pairs ranked right, pairs
        self.add_state("ordered", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        # sum of group sums, groups with a peer, groups of equal rewards, groups with a valid row
        self.add_state("groups", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        # n, sum a, sum l, sum aa, sum ll, sum al
        self.add_state("moments", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rewards: Tensor, scores: Tensor, advantages: Tensor, lengths: Tensor, valid: Tensor) -> None:
        """Take in ``(B, G)`` tensors of a rollout; invalid rows are nobody's peer."""
        peers = valid.unsqueeze(-1) & valid.unsqueeze(-2)
        peers = peers & ~torch.eye(valid.shape[-1], dtype=torch.bool, device=valid.device)
        if self.weighting is not None:
            weights = pairwise_weights(
                rewards, scores, weighting=self.weighting, temperature=self.temperature, valid=valid
            )[peers].double()
            self.histogram += torch.bincount((weights * _BINS).long().clamp(max=_BINS - 1), minlength=_BINS)
            self.extreme += ((weights < 0.05) | (weights > 0.95)).sum()
        better = peers & (rewards.unsqueeze(-1) > rewards.unsqueeze(-2))
        gap = (scores.unsqueeze(-1) - scores.unsqueeze(-2))[better]
        self.ordered += torch.stack([(gap > 0).sum() + (gap == 0).sum() / 2, better.sum()])
        counts = valid.sum(-1)
        largest = torch.where(valid, rewards, -math.inf).amax(-1)
        smallest = torch.where(valid, rewards, math.inf).amin(-1)
        kept = torch.where(valid, advantages, 0.0).double()
        self.groups += torch.stack(
            [
                kept.sum(-1)[counts > 1].sum(),
                (counts > 1).sum(),
                ((largest == smallest) & (counts > 0)).sum(),
                (counts > 0).sum(),
            ]
        )
        a, length = advantages[valid].double(), lengths[valid].double()
        columns = (torch.ones_like(a), a, length, a * a, length * length, a * length)
        self.moments += torch.stack([column.sum() for column in columns])

    def compute(self) -> dict[str, Tensor]:
        """The statistics that have data."""
        values: dict[str, Tensor] = {}
        pairs = self.histogram.sum()
        if pairs > 0:
            cdf = self.histogram.cumsum(0) / pairs
            for quantile in _QUANTILES:
                bin_index = torch.searchsorted(cdf, torch.tensor([quantile - 1e-12], device=cdf.device)).squeeze()
                values[f"weight_q{round(100 * quantile):02d}"] = (bin_index + 0.5) / _BINS
            values["weight_extreme_share"] = self.extreme / pairs
        if self.ordered[1] > 0:
            values["group_auc"] = self.ordered[0] / self.ordered[1]
        if self.groups[1] > 0:
            values["group_advantage_sum"] = self.groups[0] / self.groups[1]
        if self.groups[3] > 0:
            values["equal_reward_share"] = self.groups[2] / self.groups[3]
        n, a, length, aa, ll, al = self.moments
        spread_a, spread_length = n * aa - a * a, n * ll - length * length
        # Below this a spread is what rounding leaves of a constant.
        if n > 1 and spread_a > 1e-12 * n * aa and spread_length > 1e-12 * n * ll:
            values["advantage_length_correlation"] = (n * al - a * length) / (spread_a * spread_length).sqrt()
        return {name: value.float() for name, value in values.items()}


def _check_samples(correct: Tensor, k: int) -> None:
    if correct.ndim != 2 or correct.shape[1] < k:
        raise ValueError(f"`correct` must have shape (prompts, samples) with at least k = {k} samples, got {tuple(correct.shape)}.")
