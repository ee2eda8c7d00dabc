"""A small training run in one process: data, rewards, module, trainer, and what is compared afterwards."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from where import accelerator

from lightning_lambdapo import LambdaPODataModule, LambdaPOModule, PolicyConfig, RolloutConfig
from lightning_lambdapo.rewards import Reward, RewardInputs

ROWS = [
    {"prompt": f"{a}+{b}=", "answer": str(a + b), "reference": f"{a}+{b}={a + b}", "prompt_id": a * 4 + b}
    for a in range(4)
    for b in range(4)
]


class Digits(Reward):
    """Share of digits among the characters."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight, "digits")

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in inputs.completions]


class Same(Reward):
    """The same for every completion."""

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        return [0.3 for _ in inputs.completions]


class Rows(LambdaPODataModule):
    """A DataModule of fixed rows, as a user would write one."""

    def setup(self, stage: str) -> None:
        self._rows = {split: list(ROWS) for split in ("train", "val", "test", "predict")}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that moves weights visibly in a few steps."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def module(base: str, **settings: Any) -> LambdaPOModule:
    """A module with small rollouts and one reward."""
    defaults: dict[str, Any] = {
        "policy": PolicyConfig(base),
        "rollout": RolloutConfig(group_size=4, max_new_tokens=8),
        "rewards": [Digits()],
        "optimizer": adamw,
        "seed": 3,
    }
    return LambdaPOModule(**(defaults | settings))


def trainer(path: Path, **settings: Any) -> Trainer:
    """A trainer on one device that writes nothing by itself and does not validate."""
    defaults: dict[str, Any] = {
        "accelerator": accelerator(),
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
        "max_epochs": 1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(**(defaults | settings))


def weights(model: LightningModule) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Recorder(ModelCheckpoint):
    """Keeps what was logged at every step."""

    def __init__(self) -> None:
        super().__init__(every_n_epochs=0)
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(path: Path, model: LambdaPOModule, **settings: Any) -> list[dict[str, float]]:
    """Train on ``ROWS``, and give back what was logged at every step."""
    recorder = Recorder()
    callbacks = [*settings.pop("callbacks", []), recorder]
    trainer(path, callbacks=callbacks, enable_checkpointing=True, **settings).fit(model, Rows(batch_size=4))
    return recorder.steps


def finite_fit(path: Path, model: LambdaPOModule) -> list[dict[str, float]]:
    """The same, and nothing that is logged is NaN."""
    steps = fit(path, model)
    assert not any(math.isnan(value) for step in steps for value in step.values()), "nothing logged is NaN"
    return steps


class Outputs(Callback):
    """Keeps what every step returns."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.steps.append(outputs)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one on each line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_file(base: str, path: Path) -> Path:
    """A YAML file of a run with LoRA, and its data beside it."""
    data = path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "{row["prompt"]}", "answer": "{row["answer"]}"}}\n' for row in ROWS))
    file = path / "config.yaml"
    file.write_text(
        f"""
seed_everything: 1
trainer:
  max_epochs: 1
  log_every_n_steps: 1
  accelerator: cpu
  default_root_dir: {path}
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  callbacks:
    - {{class_path: lightning_lambdapo.RolloutCheckpoint, init_args: {{every_n_rollouts: 4}}}}
model:
  policy: {{model: {base}}}
  lora: {{r: 4, alpha: 8}}
  rollout: {{group_size: 4, max_new_tokens: 8}}
  rewards:
    - {{class_path: lightning_lambdapo.rewards.LengthPenalty, init_args: {{max_length: 8, buffer: 7, weight: 0.5}}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data:
  train: {{path: {data}}}
  batch_size: 4
"""
    )
    return file
