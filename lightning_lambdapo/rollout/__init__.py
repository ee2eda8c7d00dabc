"""Rollouts: grouped completions sampled from the policy, with their log-probabilities."""

from lightning_lambdapo.rollout.engine import RolloutConfig, RolloutEngine
from lightning_lambdapo.rollout.grouped import GroupedEngine
from lightning_lambdapo.rollout.hf import HFEngine
from lightning_lambdapo.rollout.sampling import SamplingConfig

__all__ = ["GroupedEngine", "HFEngine", "RolloutConfig", "RolloutEngine", "SamplingConfig"]
