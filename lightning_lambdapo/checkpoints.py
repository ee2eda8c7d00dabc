"""What a checkpoint holds: the trained tensors, the step counters, and nothing that needs unpickling."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from lightning_lambdapo import owed
from lightning_lambdapo.checkpoint_files import IN_SHARDS, CheckpointError, Shapes, naming, read_header
from lightning_lambdapo.parallel import flattens, plain_name, saves_shards

CHECKPOINT_KEY = "lambdapo"
CHECKPOINT_VERSION = 1


class TrainableCheckpoint(LightningModule):
    """The checkpoint hooks of a module whose frozen weights come from elsewhere.

    A checkpoint has the tensors with ``requires_grad``: an adapter, or all weights under full fine-tuning. Sharded
    checkpoints hold everything, since no rank may leave a tensor out of its shard.

    Between two training steps a checkpoint is exact. One that is asked for inside a step (by an exception, a callback)
    is exact before the step's first update, since the step is then done again from its start; after that it is marked
    as inexact, and going on from it warns.
    """

    rollout_step: int
    skipped_updates: int
    skipped_in_a_row: int
    updates_in_step: int
    owes_validation = False

    @property
    @abstractmethod
    def sampling_seed(self) -> int:
        """Seed of the sampling streams."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # frozen tensors are absent; `load_state_dict` sees that all the others are there

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, and what a resume needs; all of it loads with ``weights_only=True``."""
        unfinished = _unfinished_batches(checkpoint)
        updates = self.updates_in_step if unfinished else 0
        checkpoint[CHECKPOINT_KEY] = {
            "version": CHECKPOINT_VERSION,
            "rollout_step": self.rollout_step,
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "updates_in_unfinished_step": updates,
            "seed": self.sampling_seed,
            "owes_validation": self._trainer is not None and owed.is_owed(self.trainer, so_far=self.owes_validation),
        }
        if not updates:  # the step will be done again from its start
            _give_back(checkpoint, unfinished)
        if self._trainer is None or not saves_shards(self.trainer.strategy):
            trainable = self.trainable_tensors()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is this policy's, and take up its counters.

        Raises:
            CheckpointError: it was written by something else, by an incompatible version, or for another policy.
        """
        self.configure_model()
        if "state_dict" in checkpoint:  # strategies that shard have loaded and removed it, after the same check
            self.check_checkpoint(checkpoint, {name: value.shape for name, value in checkpoint["state_dict"].items()})
        own = checkpoint[CHECKPOINT_KEY]
        self.rollout_step = own["rollout_step"]
        self.skipped_updates = own["skipped_updates"]
        self.skipped_in_a_row = own.get("skipped_in_a_row", 0)
        if self._trainer is None:
            return
        self.owes_validation = self.trainer.state.fn == "fit" and own.get("owes_validation", False)
        if own["seed"] != self.sampling_seed:
            warnings.warn(
                f"The checkpoint's run sampled with seed {own['seed']}, this one with {self.sampling_seed}: training "
                "continues, and not as the uninterrupted run would have.",
                stacklevel=2,
            )
        updates = own.get("updates_in_unfinished_step", 0)
        if updates:
            warnings.warn(
                f"The checkpoint was saved inside a training step, when {updates} of its updates had begun: training "
                "continues with the next batch, and not as the uninterrupted run would have.",
                stacklevel=2,
            )

    def check_checkpoint(self, checkpoint: Mapping[str, Any], shapes: Shapes) -> None:
        """Refuse a checkpoint that this module cannot continue from.

        Args:
            checkpoint: its entries.
            shapes: of its weights, by name.

        Raises:
            CheckpointError: saying what does not fit.
        """
        own = checkpoint.get(CHECKPOINT_KEY)
        if not isinstance(own, dict):
            raise CheckpointError("this is not a checkpoint of LambdaPOModule; it has no entry 'lambdapo'.")
        if own.get("version") != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"it has format version {own.get('version')}, this release reads {CHECKPOINT_VERSION}; use the release "
                "that wrote it."
            )
        trainable = self.trainable_tensors()
        missing = [name for name in trainable if name not in shapes]
        other = [name for name, value in trainable.items() if name in shapes and shapes[name] != value.shape]
        if self._trainer is not None and flattens(self.trainer.strategy):
            other = []
        if missing or other:
            raise CheckpointError(
                f"it is for another policy: {len(missing)} trainable tensors are missing ({', '.join(missing[:2])}) "
                f"and {len(other)} have another shape ({', '.join(other[:2])}). Build the module with the `policy` and "
                "`lora` settings of the run that wrote it."
            )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Build a module from a checkpoint file; see Lightning's method of this name.

        Raises:
            CheckpointError: the file is missing, damaged, in shards, or not such a module's.
        """
        if not isinstance(checkpoint_path, str | Path) or "://" in str(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        path = Path(checkpoint_path)
        with naming(path):
            if path.is_dir():
                raise CheckpointError(IN_SHARDS)
            if kwargs.get("weights_only") is not False:
                read_header(path)
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what is trained; frozen weights come from ``policy`` and may be absent."""
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        trainable = self.trainable_tensors()
        missing = [name for name in keys.missing_keys if name in trainable]
        if strict and (missing or keys.unexpected_keys):
            raise RuntimeError(f"Missing keys: {missing}; unexpected keys: {keys.unexpected_keys}.")
        return _IncompatibleKeys(missing, keys.unexpected_keys)

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Parameters that are trained, by name."""
        return {plain_name(name): value for name, value in self.named_parameters() if value.requires_grad}


def _unfinished_batches(checkpoint: Mapping[str, Any]) -> int:
    """1 for a checkpoint from inside a training step, 0 for one from between two."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = fit_loop.get("epoch_loop.batch_progress", {}).get("current")
    return 0 if progress is None else int(progress["ready"] - progress["processed"])


def _give_back(checkpoint: Mapping[str, Any], batches: int) -> None:
    """Let training data and the loggers' step go on that many batches earlier."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    for position in fit_loop.get("state_dict", {}).get("combined_loader") or []:
        if "batches" in position:
            position["batches"] -= batches
    counts = fit_loop.get("epoch_loop.state_dict", {})
    if "_batches_that_stepped" in counts:  # Lightning adds one on restarting, for a step that has ended
        counts["_batches_that_stepped"] -= batches
