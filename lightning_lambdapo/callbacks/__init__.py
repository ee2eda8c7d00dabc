"""Callbacks that write a run's files. They use only what a training step returns."""

from lightning_lambdapo.callbacks.checkpoint import RolloutCheckpoint
from lightning_lambdapo.callbacks.completions import CompletionsLogger
from lightning_lambdapo.callbacks.console import TrainingConsole
from lightning_lambdapo.callbacks.evaluation_report import EvaluationReport
from lightning_lambdapo.callbacks.export import PolicyExport
from lightning_lambdapo.callbacks.plot import RewardPlot
from lightning_lambdapo.callbacks.ray_report import RayReport
from lightning_lambdapo.callbacks.run import finished_rollouts, run_directory
from lightning_lambdapo.callbacks.throughput import Throughput
from lightning_lambdapo.callbacks.update_norm import UpdateNorm

__all__ = [
    "CompletionsLogger",
    "EvaluationReport",
    "PolicyExport",
    "RayReport",
    "RewardPlot",
    "RolloutCheckpoint",
    "Throughput",
    "TrainingConsole",
    "UpdateNorm",
    "finished_rollouts",
    "run_directory",
]
