"""The trained policy, written when training ends."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedTokenizerBase

from lightning_lambdapo.callbacks.run import finished_rollouts, run_directory
from lightning_lambdapo.distributed.fsdp1 import flattens
from lightning_lambdapo.distributed.parallel import full_state_dict, is_sharded
from lightning_lambdapo.functional.ranges import path_text
from lightning_lambdapo.policy.model import Policy
from lightning_lambdapo.runs.files import read_config, unused_path
from lightning_lambdapo.runs.model_card import publish


class PolicyExport(Callback):
    """Writes the trained policy to ``export/`` when training ends, as ``lambdapo export`` does: adapter or whole model.

    Args:
        directory: directory to write to, relative to the run's directory unless it is absolute.
    """

    def __init__(self, directory: str = "export") -> None:
        self.directory = path_text(directory)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before training what cannot be exported after it."""
        if flattens(trainer.strategy):
            raise ValueError(
                f"PolicyExport cannot gather the shards of {type(trainer.strategy).__name__}. Omit it, or use "
                "ModelParallelStrategy."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights if they are in shards, and write the export on rank 0."""
        policy, tokenizer = cast(Policy, pl_module.policy), cast(PreTrainedTokenizerBase, pl_module.tokenizer)
        weights = full_state_dict(policy) if is_sharded(trainer.strategy) else None
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # values not written yet belong to the results
            run = run_directory(trainer)
            publish(
                policy,
                tokenizer,
                unused_path(run / self.directory),
                settings=pl_module.hparams,
                config=read_config(run),
                run=run,
                steps=finished_rollouts(trainer),
                weights=weights,
            )
