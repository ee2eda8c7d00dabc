"""Rollouts: grouped completions sampled from the policy, with their log-probabilities."""

from lightning_lambdapo.config import RolloutConfig, SamplingConfig
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.grouped import GroupedEngine
from lightning_lambdapo.rollout.hf import HFEngine

__all__ = ["GroupedEngine", "HFEngine", "RolloutConfig", "RolloutEngine", "SamplingConfig"]
