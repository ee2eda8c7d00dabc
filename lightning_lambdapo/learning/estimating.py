"""From rewards and confidence to advantages, by the estimator that the settings choose."""

from typing import cast

from torch import Tensor

from lightning_lambdapo.config import AlgorithmConfig
from lightning_lambdapo.distributed import parallel
from lightning_lambdapo.functional import group_advantages, lambda_advantages
from lightning_lambdapo.functional.advantages import GroupEstimator
from lightning_lambdapo.functional.own_functions import own_advantages


def estimate_advantages(algorithm: AlgorithmConfig, rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """Advantages ``(B, G)``. A collective with ``scale: batch``.

    Args:
        algorithm: the estimator and its settings.
        rewards: ``(B, G)`` float.
        confidence: ``(B, G)`` float.
        valid: ``(B, G)`` bool.
    """
    if algorithm.own_estimator is not None:
        return own_advantages(algorithm.own_estimator, rewards, confidence, valid)
    if algorithm.estimator != "lambda":
        return group_advantages(rewards, estimator=cast(GroupEstimator, algorithm.estimator), valid=valid)
    return lambda_advantages(
        rewards,
        confidence,
        weighting=algorithm.weighting,
        temperature=algorithm.temperature,
        reduction=algorithm.reduction,
        center=algorithm.center,
        scale=algorithm.scale,
        valid=valid,
        reward_std=parallel.global_std(rewards[valid]) if algorithm.scale == "batch" else None,
    )
