"""Training under Ray Train: the strategy that Ray lacks, a check of the trainer, and where a run resumes.

Ray starts the processes, joins them to a process group, and calls the training loop in each. It is imported only when
something here is used: ``pip install "lightning-lambdapo[ray]"``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

#: Name of the checkpoint in the directory that Ray keeps. It is that of Ray's own callback for Lightning.
CHECKPOINT_NAME = "checkpoint.ckpt"


class RayModelParallelStrategy(ModelParallelStrategy):
    """``ModelParallelStrategy`` (FSDP2) on the workers of Ray Train, which shard the model between all of them.

    Backend and timeout of the process group are set in ``ray.train.torch.TorchConfig``. Build the strategy in the
    training loop that Ray calls.

    Args:
        save_distributed_checkpoint: each worker writes its shard. False collects a checkpoint in one file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        import ray.train

        super().__init__(
            data_parallel_size=ray.train.get_context().get_world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
        )

    @property
    def root_device(self) -> torch.device:
        """The device that Ray gave to this worker. A worker may see the devices of others."""
        import ray.train.torch

        device: torch.device = ray.train.torch.get_device()
        return device


def prepare_trainer(trainer: Trainer) -> Trainer:
    """Refuse a trainer that would start processes of its own, or not know the ranks that Ray gave.

    Ray's function of this name refuses :class:`RayModelParallelStrategy`.

    Returns:
        The same trainer.

    Raises:
        ValueError: its strategy or its environment is not one for Ray.
    """
    from ray.train.lightning import RayDDPStrategy, RayFSDPStrategy, RayLightningEnvironment

    strategy: Any = trainer.strategy
    if not isinstance(strategy, RayDDPStrategy | RayFSDPStrategy | RayModelParallelStrategy):
        raise ValueError(
            f"Trainer(strategy={type(strategy).__name__}) does not train on Ray's workers. Use RayDDPStrategy or "
            "RayFSDPStrategy of ray.train.lightning, or RayModelParallelStrategy of "
            "lightning_lambdapo.distributed.ray_train."
        )
    environment = getattr(strategy, "cluster_environment", None)
    if not isinstance(environment, RayLightningEnvironment):
        raise ValueError(
            f"The trainer's environment is {type(environment).__name__}, which does not know Ray's ranks. Set "
            "Trainer(plugins=[ray.train.lightning.RayLightningEnvironment()])."
        )
    return trainer


@contextmanager
def resume_path() -> Iterator[str | None]:
    """The ``ckpt_path`` for ``trainer.fit``: the last checkpoint that Ray knows of, or None in a new run.

    Fit inside this context. If the storage is remote, the checkpoint is downloaded, and removed when the context ends.
    """
    import ray.train

    checkpoint: Any = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as directory:
        yield str(Path(directory) / CHECKPOINT_NAME)
