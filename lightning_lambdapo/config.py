"""Settings of the algorithm and of evaluation, checked when they are made."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from lightning_lambdapo.functional.advantages import Reduction, Scale, Temperature, Weighting
from lightning_lambdapo.functional.losses import Aggregation, KLEstimator, Level
from lightning_lambdapo.rollout import SamplingConfig

Estimator = Literal["lambda", "grpo", "dr_grpo", "rloo"]
Score = Literal["mean", "sum"]
T = TypeVar("T")


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to loss. The papers publish no values, so every default here is this package's own choice.

    Attributes:
        estimator: ``"lambda"`` (pairwise, the settings up to ``scale``) or a baseline: ``"grpo"``, ``"dr_grpo"``,
            ``"rloo"``.
        weighting: weight of a pair, see :func:`~lightning_lambdapo.functional.pairwise_weights`.
        score: a row's score is the ``"mean"`` or the ``"sum"`` of its log-probabilities at sampling.
        temperature: divisor of score differences, or ``"group_std"``: the standard deviation of the group's scores.
        reduction: how a row's pairs become one number.
        center: subtract the group's mean advantage.
        scale: divide by the standard deviation of the rewards of the ``"group"`` or of the global ``"batch"``.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: and above at ``1 + clip_high``. With one update per rollout the ratio is 1 and clipping is inert.
        importance_level: ratio per ``"token"``, or per ``"sequence"`` (GSPO).
        kl_coef: coefficient of the KL penalty; 0 runs no reference in learning, and builds one for a reward alone.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        log_kl: run the reference for the log's sake though ``kl_coef`` is 0. Then all rows are scored, also those of
            zero advantage.
        aggregation: mean over ``"token"``, mean of row means (``"sequence"``), or sum over rows times
            ``max_new_tokens`` (``"constant"``).
        mask_truncated: leave rows that hit ``max_new_tokens`` out of everything.
    """

    estimator: Estimator = "lambda"
    weighting: Weighting = "confidence"
    score: Score = "mean"
    temperature: Temperature = "group_std"
    reduction: Reduction = "mean"
    center: bool = False
    scale: Scale = "none"
    clip_low: float = 0.2
    clip_high: float = 0.2
    importance_level: Level = "token"
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    log_kl: bool = False
    aggregation: Aggregation = "token"
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        choices = {
            "estimator": Estimator,
            "weighting": Weighting,
            "score": Score,
            "reduction": Reduction,
            "scale": Scale,
            "importance_level": Level,
            "kl_estimator": KLEstimator,
            "aggregation": Aggregation,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"`algorithm.{name}` must be one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}."
                )
        if self.temperature != "group_std" and not (
            isinstance(self.temperature, int | float) and 0 < self.temperature < math.inf
        ):
            raise ValueError(
                f'`algorithm.temperature` must be a finite number above 0 or "group_std", got {self.temperature!r}.'
            )
        if not 0 <= self.clip_low <= 1 or not 0 <= self.clip_high < math.inf:
            raise ValueError(
                f"`clip_low` must be in [0, 1] and `clip_high` finite and at least 0, got {self.clip_low} and "
                f"{self.clip_high}."
            )
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"`kl_coef` must be finite and at least 0, got {self.kl_coef}.")

    @property
    def needs_reference(self) -> bool:
        """True where reference log-probabilities are computed at all."""
        return self.kl_coef > 0 or self.log_kl


@dataclass(frozen=True)
class EvaluationConfig:
    """How validation, test and prediction decode; training's sampling settings have no say in it.

    Attributes:
        num_samples: completions per prompt.
        k: pass@k and maj@k are logged for each of these; at most ``num_samples``.
        max_new_tokens: longest completion; None takes that of training.
        sampling: how tokens are drawn; greedy unless told otherwise.
    """

    num_samples: int = 1
    k: list[int] = field(default_factory=lambda: [1])
    max_new_tokens: int | None = None
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"`validation.num_samples` must be at least 1, got {self.num_samples}.")
        if not self.k or not all(1 <= k <= self.num_samples for k in self.k):
            raise ValueError(
                f"`validation.k` must list numbers from 1 to num_samples = {self.num_samples}, got {list(self.k)}; "
                "pass@k needs k samples."
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"`validation.max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if self.num_samples > 1 and self.sampling.greedy:
            raise ValueError(
                f"`validation.num_samples` is {self.num_samples} and `validation.sampling.temperature` is 0: greedy "
                "decoding gives the same completion every time; set a temperature above 0, or num_samples to 1."
            )


def from_mapping(cls: type[T], value: T | Mapping[str, Any]) -> T:
    """A config dataclass from the mapping that a checkpoint holds in its place; an instance is returned as it is."""
    if not isinstance(value, Mapping):
        return value
    types: dict[str, Any] = {entry.name: entry.type for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(
        **{
            name: from_mapping(types[name], item) if dataclasses.is_dataclass(types.get(name)) else item
            for name, item in value.items()
        }
    )
