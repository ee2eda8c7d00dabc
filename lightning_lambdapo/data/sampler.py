"""The order of prompts: the same global batches on any number of ranks, also in a resumed run."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from lightning_lambdapo.distributed.seeding import STREAMS, random_bits


class PromptSampler(DistributedSampler[Any]):
    """Deals prompts to ranks. The result depends only on seed, epoch and position.

    Global batch ``k`` of an epoch is the same set of prompts for any world size: position ``i`` of rank ``r`` is entry
    ``i * world + r`` of the epoch's order. In training, the last, incomplete global batch of an epoch is dropped, and
    the next epoch's shuffle deals its prompts again. In evaluation, nothing is dropped or repeated. A rank with one row
    fewer than others ends with the index ``len(dataset)``, which means no row, so that all ranks make equally many
    batches. Lightning keeps a ``DistributedSampler`` as it is, and calls ``set_epoch``.

    Args:
        dataset: anything with a length.
        batch_size: prompts per rank and batch.
        training: shuffle, and deal only whole global batches.
        num_replicas: number of ranks.
        rank: the rank of this process.
        seed: seed of the shuffle.
        shuffle: False keeps the data's own order in training too.

    Raises:
        ValueError: a training set smaller than one global batch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        training: bool,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=training and shuffle, seed=seed)
        count, global_batch = len(dataset), batch_size * num_replicas  # type: ignore[arg-type]
        if training and count < global_batch:
            raise ValueError(
                f"{count} training prompts do not fill one batch of {batch_size} prompts on {num_replicas} rank(s). "
                "Lower `batch_size` or use more data."
            )
        self.batch_size = batch_size
        self.total_size = count // global_batch * global_batch if training else count
        self.num_samples = -(-self.total_size // num_replicas)
        self.streams = STREAMS
        self._resume: tuple[int, int] | None = None

    def resume(self, epoch: int, batches: int, streams: int = STREAMS) -> None:
        """Skip the first ``batches`` batches of ``epoch``. Other epochs are dealt whole.

        Args:
            epoch: the epoch to continue.
            batches: its batches that were dealt before.
            streams: generation of the order, for all epochs. 1 is that of release 0.1.
        """
        self._resume = (epoch, batches)
        self.streams = streams

    @property
    def skipped(self) -> int:
        """Batches of the current epoch that a resumed run skips."""
        return self._resume[1] if self._resume is not None and self._resume[0] == self.epoch else 0

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            order = {1: _order_of_release_0_1, 2: _order}[self.streams](count, self.seed, self.epoch)
        else:
            order = list(range(count))
        mine = order[self.rank : self.total_size : self.num_replicas]
        mine += [count] * (self.num_samples - len(mine))
        return iter(mine[self.skipped * self.batch_size :])

    def __len__(self) -> int:
        """Rows of this rank in a whole epoch, even if a resumed run skips some of them."""
        return self.num_samples


class SequentialPromptSampler(PromptSampler, SequentialSampler):
    """The same in the data's own order. ``Trainer(overfit_batches=...)`` would replace any other kind of sampler."""


class PromptLoader(DataLoader[Any]):
    """A DataLoader over a :class:`PromptSampler` whose position is saved in Lightning's checkpoints.

    Batches are counted when they are handed out, so workers may run ahead.

    Attributes:
        following: the batch that comes after the one that was handed out last. None at the end of an epoch.
    """

    handed_out = 0
    following: Any = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.handed_out = self._prompt_sampler.skipped
        batches = super().__iter__()
        self.following = next(batches, None)
        while self.following is not None:
            batch, self.following = self.following, next(batches, None)
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, how many of its batches were handed out, and the generation of the order."""
        sampler = self._prompt_sampler
        return {"epoch": sampler.epoch, "batches": self.handed_out, "streams": sampler.streams}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from the saved position."""
        self._prompt_sampler.resume(state_dict["epoch"], state_dict["batches"], state_dict.get("streams", 1))

    @property
    def _prompt_sampler(self) -> PromptSampler:
        return cast(PromptSampler, self.sampler)


def _order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation in which every bit of seed and epoch matters."""
    order: list[int] = np.argsort(random_bits(count, "order", seed, epoch), kind="stable").tolist()
    return order


def _order_of_release_0_1(count: int, seed: int, epoch: int) -> list[int]:
    """The first generation: torch's generator takes only 32 bits of its seed, so seeds 1 and 4097 agree."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
