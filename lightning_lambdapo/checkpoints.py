"""What a checkpoint holds: the trained tensors, the step counters, and nothing that needs unpickling."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from lightning_lambdapo.parallel import saves_shards

CHECKPOINT_KEY = "lambdapo"
CHECKPOINT_VERSION = 1


class TrainableCheckpoint(LightningModule):
    """The checkpoint hooks of a module whose frozen weights come from elsewhere.

    A checkpoint has the tensors with ``requires_grad``: an adapter, or all weights under full fine-tuning. Sharded
    checkpoints hold everything, since no rank may leave a tensor out of its shard.
    """

    rollout_step: int
    skipped_updates: int

    @property
    @abstractmethod
    def sampling_seed(self) -> int:
        """Seed of the sampling streams."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # frozen tensors are absent; `load_state_dict` sees that all the others are there

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, and what a resume needs; all of it loads with ``weights_only=True``."""
        checkpoint[CHECKPOINT_KEY] = {
            "version": CHECKPOINT_VERSION,
            "rollout_step": self.rollout_step,
            "skipped_updates": self.skipped_updates,
            "seed": self.sampling_seed,
        }
        if self._trainer is None or not saves_shards(self.trainer.strategy):
            trainable = self.trainable_tensors()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is this policy's, and take up its counters.

        Raises:
            ValueError: it was written by something else, by an incompatible version, or for another policy.
        """
        self.configure_model()
        own = _check(checkpoint, self.trainable_tensors())
        self.rollout_step = own["rollout_step"]
        self.skipped_updates = own["skipped_updates"]
        if self._trainer is not None and own["seed"] != self.sampling_seed:
            warnings.warn(
                f"The checkpoint's run sampled with seed {own['seed']}, this one with {self.sampling_seed}: training "
                "continues, and not as the uninterrupted run would have.",
                stacklevel=2,
            )

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
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def _check(checkpoint: Mapping[str, Any], trainable: Mapping[str, Tensor]) -> dict[str, Any]:
    """Refuse a checkpoint that this module cannot continue from; returns the package's own entry."""
    own = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(own, dict) or "state_dict" not in checkpoint:
        raise ValueError("This is not a checkpoint of LambdaPOModule: it has no entry 'lambdapo'.")
    if own.get("version") != CHECKPOINT_VERSION:
        raise ValueError(
            f"The checkpoint has format version {own.get('version')}, this release reads {CHECKPOINT_VERSION}; use the "
            "release that wrote it."
        )
    held = checkpoint["state_dict"]
    missing = [name for name in trainable if name not in held]
    other = [name for name, value in trainable.items() if name in held and held[name].shape != value.shape]
    if missing or other:
        raise ValueError(
            f"The checkpoint is for another policy: {len(missing)} trainable tensors are missing "
            f"({', '.join(missing[:2])}) and {len(other)} have another shape ({', '.join(other[:2])}). Build the "
            "module with the `policy` and `lora` settings of the run that wrote it."
        )
    return own
