"""LambdaPO for PyTorch Lightning: pairwise, confidence-weighted advantages and a semantic-density reward.

Public names are imported when they are first used, so that ``import lightning_lambdapo.functional`` loads neither
lightning nor transformers.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Said at every import on a CPU, of an optional kernel that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))

_HOMES = {
    "AdapterConfig": "policy",
    "AlgorithmConfig": "config",
    "CompletionsLogger": "callbacks",
    "DataSource": "data",
    "EvaluationConfig": "config",
    "EvaluationReport": "reports",
    "LambdaPODataModule": "data",
    "LambdaPOModule": "module",
    "PolicyConfig": "policy",
    "PolicyExport": "callbacks",
    "PromptBatch": "datatypes",
    "PromptCollator": "data",
    "PromptTemplate": "data",
    "RewardPlot": "callbacks",
    "RolloutCheckpoint": "callbacks",
    "RolloutConfig": "rollout",
    "SamplingConfig": "rollout",
    "Throughput": "callbacks",
    "TrainingConsole": "console",
}

__all__ = [
    "AdapterConfig",
    "AlgorithmConfig",
    "CompletionsLogger",
    "DataSource",
    "EvaluationConfig",
    "EvaluationReport",
    "LambdaPODataModule",
    "LambdaPOModule",
    "PolicyConfig",
    "PolicyExport",
    "PromptBatch",
    "PromptCollator",
    "PromptTemplate",
    "RewardPlot",
    "RolloutCheckpoint",
    "RolloutConfig",
    "SamplingConfig",
    "Throughput",
    "TrainingConsole",
]

if TYPE_CHECKING:
    from lightning_lambdapo.callbacks import (
        CompletionsLogger,
        PolicyExport,
        RewardPlot,
        RolloutCheckpoint,
        Throughput,
    )
    from lightning_lambdapo.config import AlgorithmConfig, EvaluationConfig
    from lightning_lambdapo.console import TrainingConsole
    from lightning_lambdapo.data import DataSource, LambdaPODataModule, PromptCollator, PromptTemplate
    from lightning_lambdapo.datatypes import PromptBatch
    from lightning_lambdapo.module import LambdaPOModule
    from lightning_lambdapo.policy import AdapterConfig, PolicyConfig
    from lightning_lambdapo.reports import EvaluationReport
    from lightning_lambdapo.rollout import RolloutConfig, SamplingConfig


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
