"""LambdaPO for PyTorch Lightning: pairwise, confidence-weighted advantages and a semantic-density reward.

Public names are imported on first use, so that ``import lightning_lambdapo.functional`` loads neither lightning nor
transformers.
"""

import importlib
import logging
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

# bitsandbytes prints this at every import on a CPU. It is about an optional kernel that is not needed here.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))

_HOMES = {
    "AdapterConfig": "config",
    "AlgorithmConfig": "config",
    "CompletionsLogger": "callbacks",
    "DataSource": "data",
    "EvaluationConfig": "config",
    "EvaluationReport": "callbacks",
    "LambdaPODataModule": "data",
    "LambdaPOModule": "module",
    "PolicyConfig": "config",
    "PolicyExport": "callbacks",
    "PromptBatch": "datatypes",
    "PromptCollator": "data",
    "PromptTemplate": "data",
    "RewardPlot": "callbacks",
    "RolloutCheckpoint": "callbacks",
    "RolloutConfig": "config",
    "SamplingConfig": "config",
    "Throughput": "callbacks",
    "TrainingConsole": "callbacks",
    "UpdateNorm": "callbacks",
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
    "UpdateNorm",
]

if TYPE_CHECKING:
    from lightning_lambdapo.callbacks import (
        CompletionsLogger,
        EvaluationReport,
        PolicyExport,
        RewardPlot,
        RolloutCheckpoint,
        Throughput,
        TrainingConsole,
        UpdateNorm,
    )
    from lightning_lambdapo.config import (
        AdapterConfig,
        AlgorithmConfig,
        EvaluationConfig,
        PolicyConfig,
        RolloutConfig,
        SamplingConfig,
    )
    from lightning_lambdapo.data import DataSource, LambdaPODataModule, PromptCollator, PromptTemplate
    from lightning_lambdapo.datatypes import PromptBatch
    from lightning_lambdapo.module import LambdaPOModule


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Moved(MetaPathFinder, Loader):
    """Lets class paths and imports of release 0.1 find modules that have moved."""

    homes = {  # noqa: RUF012 -- never changed
        f"{__name__}.cli": f"{__name__}.commands.main",
        f"{__name__}.console": f"{__name__}.callbacks.console",
        f"{__name__}.reports": f"{__name__}.callbacks.evaluation_report",
    }

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.homes else None

    def exec_module(self, module: ModuleType) -> None:
        home = importlib.import_module(self.homes[module.__name__])
        vars(module)["__getattr__"] = lambda name: getattr(home, name)


sys.meta_path.append(_Moved())
