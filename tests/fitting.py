"""A small run that can be told to die at a chosen moment, for tests of resuming, scaling and faults.

Everything is a module-level function of plain arguments, so that :mod:`ranks` can call it in other processes.
"""

import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from ranks import on_ranks, succeed
from small import Rows, module
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.futures import Future
from where import accelerator

from lightning_lambdapo import AdapterConfig, CompletionsLogger, PolicyConfig, RolloutCheckpoint, UpdateNorm
from lightning_lambdapo.callbacks.run import finished_rollouts
from lightning_lambdapo.checkpointing import files as checkpoint_files
from lightning_lambdapo.distributed import fsdp1, parallel
from lightning_lambdapo.learning.learner import Learner
from lightning_lambdapo.rewards import Reward, RewardInputs
from lightning_lambdapo.rollout.sampler import RolloutSampler
from lightning_lambdapo.rollout.sampling import TokenSampler

STEPS_PER_EPOCH = 4
EPOCHS = 3
PROMPTS = 4  # per step, over all ranks
TIMEOUT = timedelta(minutes=10)


class Noisy(Reward):
    """Share of digits, plus noise from the global generators: a reward that is random, as some are."""

    def __init__(self) -> None:
        super().__init__(1.0, "noisy")

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        noise = torch.rand(len(inputs.completions)).tolist()
        return [
            sum(map(str.isdigit, text)) / max(len(text), 1) + 0.01 * extra
            for text, extra in zip(inputs.completions, noise, strict=True)
        ]


class FSDP1(FSDPStrategy):
    """Lightning's, which it refuses on the CPU by its very type."""


def strategy(name: str) -> dict[str, Any]:
    """Trainer arguments of a strategy by name: ``one``, ``ddp``, ``fsdp`` (full checkpoints) or ``shards``."""
    limits: dict[str, Any] = {"process_group_backend": "gloo", "timeout": TIMEOUT}
    count = parallel_ranks()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = count // local
    if name == "one":
        return {"strategy": "auto", "devices": 1}
    if name == "fsdp1":
        return {"strategy": FSDP1(state_dict_type="sharded", **limits), "devices": local, "num_nodes": nodes}
    if name == "ddp":
        return {"strategy": DDPStrategy(**limits), "devices": local, "num_nodes": nodes}
    sharding = ModelParallelStrategy(
        data_parallel_size=count, tensor_parallel_size=1, save_distributed_checkpoint=name == "shards", **limits
    )
    return {"strategy": sharding, "devices": local, "num_nodes": nodes}


def parallel_ranks() -> int:
    """How many ranks :mod:`ranks` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def policy_settings(base: str, kind: str) -> dict[str, Any]:
    """Module arguments by name: ``full``, ``lora``, ``dropout`` (LoRA with it) or ``nf4``; float64 with ``64``."""
    quantization: Any = "nf4" if kind == "nf4" else None
    dtype: Any = "float64" if kind.endswith("64") else "float32"
    settings: dict[str, Any] = {"policy": PolicyConfig(base, quantization=quantization, dtype=dtype)}
    if not kind.startswith("full"):
        settings["lora"] = AdapterConfig(r=4, dropout=0.1 if kind == "dropout" else 0.0)
    return settings


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule that is different at every update."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


def train(
    directory: Path,
    base: str,
    *,
    how: str = "one",
    kind: str = "dropout",
    resume: str | None = None,
    every: int = 2,
    death: str | None = None,
    save_on_exception: bool = False,
    validate: bool = True,
    callbacks: Sequence[Callback] = (),
    trainer: dict[str, Any] | None = None,
    data: LightningDataModule | None = None,
    **settings: Any,
) -> LightningModule:
    """Three epochs of four steps, with validation, logs, completions and a checkpoint every two steps.

    ``death`` is ``"MOMENT STEP [SIGNAL [RANK]]"``; see :func:`prepare_death`.
    """
    defaults: dict[str, Any] = {
        "rewards": [Noisy()],
        "updates_per_rollout": 2,
        "lr_scheduler": cosine,
    } | policy_settings(base, kind)
    model = module(base, **(defaults | settings))
    own: list[Callback] = [
        CompletionsLogger(),
        UpdateNorm(),
        RolloutCheckpoint(every_n_rollouts=every, save_top_k=-1, save_on_exception=save_on_exception),
        *callbacks,
    ]
    if death is not None:
        own.append(prepare_death(model, *death.split()))
    arguments: dict[str, Any] = {
        "accelerator": accelerator(),
        "logger": CSVLogger(directory, flush_logs_every_n_steps=1),
        "callbacks": own,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": directory,
        "max_epochs": EPOCHS,
        "limit_val_batches": 1.0 if validate else 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    } | strategy(how)
    run = Trainer(**(arguments | (trainer or {})))
    torch.seed()  # of no consequence
    run.fit(model, data or Rows(batch_size=PROMPTS // parallel_ranks()), ckpt_path=resume)
    wrapped: Any = run.strategy.model
    with FullyShardedDataParallel.summon_full_params(wrapped) if how == "fsdp1" else nullcontext():
        weights = {fsdp1.plain_name(name): whole(value) for name, value in model.named_parameters()}
    if run.is_global_zero:
        torch.save(weights, directory / "weights.pt")
    return model


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Let ``around(original, ...)`` be called in place of a function or method, for the life of this process."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: around(original, *arguments, **options))


class Counting(Callback):
    """Writes what a run did on its rank to ``counts-RANK.json``: micro-batches, synchronised backwards, gatherings."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.micro_batches: list[int] = []
        self.gathers: list[int] = []
        self.synced = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        gathered = [0]

        def plan(original: Any, *arguments: Any) -> Any:
            found = original(*arguments)
            self.micro_batches.append(len(found))
            return found

        def gather(original: Any, *arguments: Any, **options: Any) -> Any:
            gathered[0] += 1
            return original(*arguments, **options)

        def rollout(original: Any, *arguments: Any, **options: Any) -> Any:
            before = gathered[0]
            found = original(*arguments, **options)
            self.gathers.append(gathered[0] - before)
            return found

        wrap(Learner, "micro_batches", plan)
        if parallel.is_sharded(trainer.strategy):
            wrap(_fsdp_param_group, "foreach_all_gather", gather)
            wrap(RolloutSampler, "complete", rollout)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if parallel.replicates(trainer.strategy):
            model: Any = trainer.strategy.model

            def hook(state: Any, bucket: GradBucket) -> Future[Tensor]:
                self.synced += bucket.is_last()
                return allreduce_hook(state, bucket)

            model.register_comm_hook(None, hook)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {"micro_batches": self.micro_batches, "gathers": self.gathers, "synced": self.synced}
        (self.directory / f"counts-{parallel.rank()}.json").write_text(json.dumps(found))


def train_counting(directory: Path, base: str, **options: Any) -> None:
    """The same, with :class:`Counting`."""
    train(directory, base, callbacks=[Counting(directory)], **options)


def train_on_ranks(directory: Path, base: str, ranks: int, **options: Any) -> Path:
    """The same on a number of ranks, which must all succeed; the directory comes back."""
    directory.mkdir(exist_ok=True)
    succeed(on_ranks(ranks, train_counting, directory, base, logs=directory / "logs", **options))
    return directory


def whole(value: Tensor) -> Tensor:
    """A parameter, gathered where it is in shards."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


class Death(Callback):
    """Sends this process a signal at the end of an epoch, or in a validation."""

    def __init__(self, moment: str, step: int, die: Callable[[], None]) -> None:
        self.moment, self.step, self.die = moment, step, die

    def _check(self, trainer: Trainer, moment: str) -> None:
        if self.moment == moment and finished_rollouts(trainer) + (moment == "update") == self.step:
            self.die()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, "epoch_end")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._check(trainer, "validation")

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self._check(trainer, "update")


def prepare_death(model: Any, moment: str, step: str, sent: str = "SIGKILL", rank: str = "all") -> Callback:
    """Arrange for a signal at a moment of a step (counted from 1), on one rank or on all.

    Moments: ``rollout`` (after three tokens), ``learning`` (after a micro-batch's backward pass), ``update`` (before
    the optimizer moves), ``validation``, ``epoch_end``, ``saving`` (half a checkpoint file is written), ``flushing``
    (all of it is written, and not in its place), ``swapping`` (the old directory of shards is out of the way, the new
    one not in its place).
    """
    at = int(step)

    def die() -> None:
        if rank in ("all", str(parallel.rank())):
            os.kill(os.getpid(), getattr(signal, sent))

    tokens = [0]

    def sample(original: Any, *arguments: Any) -> Any:
        if moment == "rollout" and model.trainer.training and model.rollout_step + 1 == at:
            tokens[0] += 1
            if tokens[0] == 3:
                die()
        return original(*arguments)

    def loss(original: Any, *arguments: Any) -> Any:
        if moment == "learning" and model.rollout_step + 1 == at:
            die()
        return original(*arguments)

    def write(original: Any, file: Any, data: bytes) -> Any:
        if moment == "saving" and model.rollout_step == at:
            original(file, data[: len(data) // 2])
            file.flush()
            die()
        return original(file, data)

    def flush(original: Any, path: Path) -> Any:
        if moment == "flushing" and model.rollout_step == at:
            die()
        return original(path)

    def rename(original: Any, *arguments: Any) -> Any:
        found = original(*arguments)
        if moment == "swapping" and model.rollout_step == at and "-previous" in str(arguments[1]):
            die()
        return found

    wrap(TokenSampler, "__call__", sample)
    wrap(Learner, "_loss", loss)
    wrap(LocalFileOpener, "write", write)
    wrap(checkpoint_files, "_flush", flush)
    wrap(Path, "rename", rename)
    return Death(moment, at, die)


def version(directory: Path, number: int = 0) -> Path:
    """The directory of a run's files."""
    return directory / "lightning_logs" / f"version_{number}"


def checkpoint(directory: Path, name: str = "last", number: int = 0) -> Path:
    """A checkpoint of a run."""
    return version(directory, number) / "checkpoints" / f"{name}.ckpt"


def completions(directory: Path, number: int = 0) -> list[dict[str, Any]]:
    """What was sampled, in a canonical order (ranks write one after the other)."""
    lines = (version(directory, number) / "completions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return sorted(records, key=lambda record: (record["step"], record["prompt_id"], record["sample"]))


def metrics(directory: Path, number: int = 0) -> dict[tuple[int, str], float]:
    """What was logged, the epoch among it, by (step, name)."""
    import csv

    with (version(directory, number) / "metrics.csv").open() as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name != "step"
        }
