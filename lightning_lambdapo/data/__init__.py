"""Data: problems from files, the hub or generators, as batches of prompts."""

from lightning_lambdapo.data.collate import PromptCollator
from lightning_lambdapo.data.datamodule import LambdaPODataModule
from lightning_lambdapo.data.presets import PRESETS
from lightning_lambdapo.data.sampler import PromptLoader, PromptSampler
from lightning_lambdapo.data.sources import DataSource, load_rows
from lightning_lambdapo.data.templates import PromptTemplate

__all__ = [
    "PRESETS",
    "DataSource",
    "LambdaPODataModule",
    "PromptCollator",
    "PromptLoader",
    "PromptSampler",
    "PromptTemplate",
    "load_rows",
]
