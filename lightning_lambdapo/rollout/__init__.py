"""Rollouts: grouped completions sampled from the policy, with their log-probabilities."""

from lightning_lambdapo.config import RolloutConfig, SamplingConfig
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.grouped import GroupedEngine
from lightning_lambdapo.rollout.hf import HFEngine
from lightning_lambdapo.rollout.preparing import prepare_engine

__all__ = ["GroupedEngine", "HFEngine", "RolloutConfig", "RolloutEngine", "SamplingConfig", "prepare_engine"]
