"""Train the tiny policy on one or two processes; run as a script, whose launcher starts the other rank.

Arguments: strategy (``one``, ``ddp`` or ``fsdp``), adapter (``full`` or ``lora``), directory of the base, output file.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_module import Recorder, Rows, module, trainer
from torch.distributed.tensor import DTensor

from lightning_lambdapo import AdapterConfig

PROMPTS = 4


def train(strategy: str, adapter: str, base: str, output: str) -> None:
    """Write what was logged at every step and at the end, and all weights, to ``output``."""
    limits: dict[str, Any] = {"process_group_backend": "gloo", "timeout": timedelta(seconds=60)}
    parallel: dict[str, Any] = {"strategy": "auto", "devices": 1}
    if strategy == "ddp":
        parallel = {"strategy": DDPStrategy(**limits), "devices": 2}
    elif strategy == "fsdp":
        sharding = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False, **limits
        )
        parallel = {"strategy": sharding, "devices": 2}
    model = module(base, updates_per_rollout=2, lora=AdapterConfig(r=4) if adapter == "lora" else None)
    recorder = Recorder()
    run = trainer(
        Path(output).parent, callbacks=[recorder], enable_checkpointing=True, limit_val_batches=1.0, **parallel
    )
    run.fit(model, Rows(batch_size=PROMPTS // parallel["devices"]))
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        for name, value in model.named_parameters()
    }
    if run.is_global_zero:
        final = {name: float(value) for name, value in run.callback_metrics.items()}
        torch.save({"steps": [*recorder.steps, final], "weights": weights}, output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(*sys.argv[1:])
