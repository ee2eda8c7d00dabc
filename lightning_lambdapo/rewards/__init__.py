"""Judges of completions, and how several of them become one total."""

from lightning_lambdapo.rewards.accuracy import AccuracyReward
from lightning_lambdapo.rewards.base import FunctionReward, Reward, RewardInputs, as_rewards
from lightning_lambdapo.rewards.formatting import FormatReward
from lightning_lambdapo.rewards.judging import judge
from lightning_lambdapo.rewards.length import LengthPenalty
from lightning_lambdapo.rewards.semantic_density import SemanticDensityReward
from lightning_lambdapo.rewards.verifier.pool import MathVerifier, Verdict

score = judge  #: its name in release 0.1

__all__ = [
    "AccuracyReward",
    "FormatReward",
    "FunctionReward",
    "LengthPenalty",
    "MathVerifier",
    "Reward",
    "RewardInputs",
    "SemanticDensityReward",
    "Verdict",
    "as_rewards",
    "judge",
    "score",
]
