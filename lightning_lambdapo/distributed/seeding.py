"""Randomness that depends on the step alone, so that no generator's state must be saved."""

import functools
import hashlib
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_lambdapo.distributed.parallel import rank

R = TypeVar("R")

#: Generation of the order of prompts and of the streams of rows in new runs. A run of release 0.1 keeps the first.
STREAMS = 2


class _Seeded(Protocol):
    @property
    def rollout_step(self) -> int: ...

    @property
    def sampling_seed(self) -> int: ...


def random_bits(count: int, *key: str | int) -> npt.NDArray[np.uint64]:
    """``count`` random 64-bit numbers, a prefix of themselves at a greater ``count``.

    They are Philox's under the 128-bit digest of ``key``, so every bit of every part of the key matters. NumPy
    promises the same raw numbers in every release.
    """
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)


@contextmanager
def step_randomness(seed: int, step: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators by (seed, step, rank) inside this context, then restore them.

    Sampling has its own streams. Other randomness (dropout of an adapter, rewards that draw numbers) then repeats in a
    resumed run without any state in the checkpoint.
    """
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, rank()), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    with isolate_rng():
        random.seed(value)
        np.random.seed(value % 2**32)  # noqa: NPY002 -- rewards may draw from the legacy generator
        torch.manual_seed(value)
        yield


def with_step_randomness(step: Callable[..., R]) -> Callable[..., R]:
    """Decorate a ``training_step``: it runs under :func:`step_randomness` of its seed and step."""

    @functools.wraps(step)
    def seeded(module: _Seeded, *args: Any, **kwargs: Any) -> R:
        with step_randomness(module.sampling_seed, module.rollout_step):
            return step(module, *args, **kwargs)

    return seeded


def log_seeds(trainer: Trainer, *, sampling: int) -> None:
    """Write the seed of each source of randomness to the loggers' hyper-parameters and to the console."""
    given = os.environ.get("PL_GLOBAL_SEED")
    seeds = {
        "seed/global": None if given is None else int(given),  # initial weights that are in no checkpoint
        "seed/sampling": sampling,  # token streams, adapter weights, and (with step and rank) all else in a step
    } | {f"seed/{name}": seed for name, seed in getattr(trainer.datamodule, "seeds", {}).items()}  # type: ignore[attr-defined]
    for logger in trainer.loggers:
        logger.log_hyperparams(seeds)
    rank_zero_info("Seeds: " + ", ".join(f"{name.removeprefix('seed/')} {value}" for name, value in seeds.items()))
