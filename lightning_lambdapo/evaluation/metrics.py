"""torchmetrics of reasoning reinforcement learning.

Every state is a sum, so merging ranks gives the result of one process that saw all rows. Whether a statistic has data
is decided after merging, so all ranks agree on it. Sums are float64 and counts int64 under every precision.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_lambdapo.evaluation.estimators import majority_is_right, pass_at_k
from lightning_lambdapo.functional import pairwise_weights, reasoning_trace, tokenize
from lightning_lambdapo.functional.advantages import Temperature, Weighting, check_weighting, rewards_differ
from lightning_lambdapo.functional.masking import check_same_shape
from lightning_lambdapo.functional.semantic_density import (
    Kind,
    _density_compute,
    _density_update,
    check_density_settings,
)
from lightning_lambdapo.functional.token_weights import TokenWeights

_BINS = 1000
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class _ExactSums(Metric):
    """A metric whose states keep their types when a module that holds it is cast.

    ``Trainer(precision="bf16-true")`` casts the whole module, and a bfloat16 sum of ones ends at 256. ``set_dtype``,
    torchmetrics' own way to ask for another type, still works.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def without_cast(value: Tensor) -> Tensor:
            changed = fn(value)
            return changed if changed.dtype == value.dtype else value.to(changed.device)

        return super()._apply(fn if self._dtype_convert else without_cast, exclude_state)


class SemanticDensity(_ExactSums):
    """Mean precision, recall and F of reasoning traces against reference solutions.

    See :func:`~lightning_lambdapo.functional.semantic_density`. Both texts are cut before their last final-answer
    marker and tokenised in the same way.

    Args:
        kind: ``"token"`` (clipped n-gram overlap) or ``"rouge_l"``.
        n: length of the n-grams.
        beta: weight of recall against precision.
        tokenizer: text -> tokens, for both texts.
        token_weights: how much each token counts, such as :meth:`TokenWeights.idf` of the training set's tokenised
            traces. None counts each as 1. It may be set until the first update.
        **kwargs: as for ``torchmetrics.Metric``.

    Raises:
        ValueError: settings that :func:`~lightning_lambdapo.functional.semantic_density` refuses.

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
        token_weights: TokenWeights | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_density_settings(kind=kind, n=n, beta=beta)
        self.kind = kind
        self.n = n
        self.beta = beta
        self.tokenizer = tokenizer
        self.token_weights = token_weights
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, generated: Sequence[str], references: Sequence[str | None]) -> None:
        """Add texts and their references, one each. A row whose reference is None is skipped."""
        if len(generated) != len(references):
            raise ValueError(f"{len(generated)} generated texts have {len(references)} references. Give one each.")
        # Rows of a group share their reference, which is tokenised once.
        tokens = {text: self.tokenizer(reasoning_trace(text)) for text in {*references} if text is not None}
        densities = [
            _density_compute(
                *_density_update(
                    self.tokenizer(reasoning_trace(text)),
                    tokens[reference],
                    kind=self.kind,
                    n=self.n,
                    weights=self.token_weights,
                ),
                beta=self.beta,
            )
            for text, reference in zip(generated, references, strict=True)
            if reference is not None
        ]
        self.sums += torch.tensor(densities, dtype=torch.float64).view(-1, 3).sum(0).to(self.sums.device)
        self.rows += len(densities)

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall`` and ``f``. Empty without data."""
        if self.rows == 0:
            return {}
        means = (self.sums / self.rows).float()
        return dict(zip(("precision", "recall", "f"), means, strict=True))


class _AtK(_ExactSums):
    """What pass@k and maj@k share: a mean over prompts of what their first ``k`` samples are worth."""

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

    def compute(self) -> Tensor:
        """Mean over prompts. NaN without data."""
        return (self.total / self.prompts).float()


class PassAtK(_AtK):
    r"""Unbiased pass@k: the probability that at least one of ``k`` samples is correct.

    .. math:: 1 - \binom{n - c}{k} / \binom{n}{k}

    for ``c`` correct of ``n`` samples, averaged over prompts. Source: Chen et al. 2021, arXiv 2107.03374.

    Args:
        k: number of samples.
        **kwargs: as for ``torchmetrics.Metric``.

    Raises:
        ValueError: ``k`` below 1, or fewer than ``k`` samples in an update.

    Example:
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([[True, False, False, False]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def update(self, correct: Tensor) -> None:
        """Add ``(B, n)`` bool, ``n`` at least ``k``."""
        _check_samples(correct, self.k)
        for right in correct.bool().sum(-1).tolist():
            self.total += pass_at_k(correct.shape[1], right, self.k)
        self.prompts += len(correct)


class MajorityAtK(_AtK):
    """maj@k: the share of prompts whose most frequent answer among the first ``k`` samples is correct.

    None does not vote. A tie goes to the answer that came first. Without a vote, the prompt counts as wrong. The answer
    is correct where a sample that voted for it is. Source: self-consistency, Wang et al. 2022, arXiv 2203.11171.

    Args:
        k: number of samples that vote.
        **kwargs: as for ``torchmetrics.Metric``.

    Raises:
        ValueError: ``k`` below 1, fewer than ``k`` samples, or votes that do not match ``correct``.

    Example:
        >>> metric = MajorityAtK(k=3)
        >>> metric.update([["7", "9", "9"]], torch.tensor([[False, True, True]]))
        >>> metric.compute()
        tensor(1.)
    """

    def update(self, votes: Sequence[Sequence[str | None]], correct: Tensor) -> None:
        """Add each prompt's ``n`` answers and which of them are correct, ``(B, n)`` bool, ``n`` at least ``k``."""
        _check_samples(correct, self.k)
        if [len(row) for row in votes] != [correct.shape[1]] * len(correct):
            raise ValueError(f"`votes` must hold {len(correct)} rows of {correct.shape[1]} answers, as `correct` does.")
        for answers, flags in zip(votes, correct.bool().tolist(), strict=True):
            self.total += majority_is_right(answers[: self.k], flags[: self.k])
        self.prompts += len(correct)


class GroupDiagnostics(_ExactSums):
    """Diagnostics of the pairwise advantage, over valid rows only: weights, ranking, balance, length.

    ``compute`` returns, where there is data:

    - ``weight_q05``, ``weight_q25``, ``weight_q50``, ``weight_q75``, ``weight_q95``: quantiles of the pair weights,
      from a histogram of 1,000 bins over [0, 1]: the middle of the quantile's bin, at most 0.0005 off.
    - ``weight_extreme_share``: share of pair weights outside [0.05, 0.95], from exact counts.
    - ``group_auc``: share of pairs with :math:`R_i > R_j` that the policy already ranks right, ties half.
    - ``group_sum``: sum of a group's advantages, mean over groups with at least two valid rows.
    - ``advantage_length_correlation``: Pearson's, over rows.
    - ``equal_reward_share``: share of groups whose rewards are all equal, among groups with a valid row.

    Args:
        weighting: see :func:`~lightning_lambdapo.functional.pairwise_weights`. None (a baseline estimator) omits the
            statistics of weights.
        temperature: see :func:`~lightning_lambdapo.functional.pairwise_weights`.
        **kwargs: as for ``torchmetrics.Metric``.

    Raises:
        ValueError: settings that :func:`~lightning_lambdapo.functional.pairwise_weights` refuses, different shapes.

    Example:
        >>> metric = GroupDiagnostics(weighting="confidence", temperature=1.0)
        >>> metric.update(
        ...     rewards=torch.tensor([[1.0, 0.0, 0.0]]),
        ...     scores=torch.tensor([[-0.5, -0.2, -0.9]]),
        ...     advantages=torch.tensor([[0.5, -0.3, -0.1]]),
        ...     lengths=torch.tensor([[9, 4, 7]]),
        ...     valid=torch.tensor([[True, True, True]]),
        ... )
        >>> values = metric.compute()
        >>> values["group_auc"], values["group_sum"]
        (tensor(0.5000), tensor(0.1000))
    """

    is_differentiable = False
    full_state_update = False
    histogram: Tensor
    extreme: Tensor
    ordered: Tensor
    groups: Tensor
    moments: Tensor

    def __init__(self, weighting: Weighting | None, temperature: Temperature = "group_std", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if weighting is not None:
            check_weighting(weighting, temperature)
        self.weighting = weighting
        self.temperature = temperature
        self.add_state("histogram", torch.zeros(_BINS, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("extreme", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # float64, because float32 cannot count beyond 2^24 and a correlation from sums loses digits:
        # pairs ranked right, pairs
        self.add_state("ordered", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        # sum of group sums, groups with a peer, groups of equal rewards, groups with a valid row
        self.add_state("groups", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        # n, sum a, sum l, sum aa, sum ll, sum al
        self.add_state("moments", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rewards: Tensor, scores: Tensor, advantages: Tensor, lengths: Tensor, valid: Tensor) -> None:
        """Add ``(B, G)`` tensors of a rollout. Values in invalid places have no effect."""
        check_same_shape(rewards=rewards, scores=scores, advantages=advantages, lengths=lengths, valid=valid)
        valid = valid.bool()
        peers = valid.unsqueeze(-1) & valid.unsqueeze(-2)
        peers = peers & ~torch.eye(valid.shape[-1], dtype=torch.bool, device=valid.device)
        if self.weighting is not None:
            weights = pairwise_weights(
                rewards, scores, weighting=self.weighting, temperature=self.temperature, valid=valid
            )[peers].double()
            self.histogram += torch.bincount((weights * _BINS).long().clamp(max=_BINS - 1), minlength=_BINS)
            self.extreme += ((weights < 0.05) | (weights > 0.95)).sum()
        better = peers & (rewards.unsqueeze(-1) > rewards.unsqueeze(-2))
        higher, lower = scores.unsqueeze(-1).expand_as(peers)[better], scores.unsqueeze(-2).expand_as(peers)[better]
        ranked = (higher > lower).double() + (higher == lower).double() / 2
        self.ordered += torch.stack([ranked.sum(), better.double().sum()])
        counts = valid.sum(-1)
        kept = torch.where(valid, advantages.double(), 0.0)
        self.groups += torch.stack(
            [
                kept.sum(-1)[counts > 1].sum(),
                (counts > 1).sum(),
                ((counts > 0) & ~rewards_differ(rewards, valid)).sum(),
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
            cumulative = self.histogram.cumsum(0).double()
            wanted = cumulative.new_tensor(_QUANTILES) * pairs * (1 - 1e-12)  # so that rounding skips no bin
            for quantile, index in zip(_QUANTILES, torch.searchsorted(cumulative, wanted), strict=True):
                values[f"weight_q{round(100 * quantile):02d}"] = (index.double() + 0.5) / _BINS
            values["weight_extreme_share"] = self.extreme.double() / pairs
        if self.ordered[1] > 0:
            values["group_auc"] = self.ordered[0] / self.ordered[1]
        if self.groups[1] > 0:
            values["group_sum"] = self.groups[0] / self.groups[1]
        if self.groups[3] > 0:
            values["equal_reward_share"] = self.groups[2] / self.groups[3]
        n, a, length, aa, ll, al = self.moments
        spread_a, spread_length = n * aa - a * a, n * ll - length * length
        # A smaller spread is only the rounding error of a constant.
        if n > 1 and spread_a > 1e-12 * n * aa and spread_length > 1e-12 * n * ll:
            correlation = (n * al - a * length) / (spread_a.sqrt() * spread_length.sqrt())
            values["advantage_length_correlation"] = correlation.clamp(-1, 1)
        return {name: value.float() for name, value in values.items()}


def _check_samples(correct: Tensor, k: int) -> None:
    if correct.ndim != 2 or correct.shape[1] < k:
        raise ValueError(
            f"`correct` must have shape (prompts, samples) with at least k = {k} samples, got {tuple(correct.shape)}."
        )
