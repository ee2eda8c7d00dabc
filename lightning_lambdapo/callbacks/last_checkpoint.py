"""A last checkpoint that was asked for and is not there."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_lambdapo.checkpointing.files import CheckpointError


class LastCheckpoint(Callback):
    """With ``ckpt_path="last"`` only ``fit`` may begin without a checkpoint, and then says so.

    Lightning itself warns, and evaluates a model that was not trained.

    Attributes:
        asked: the run was started with ``ckpt_path="last"``. Reset when that is checked.
    """

    asked = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that training starts anew, if it does."""
        if self._is_missing(trainer):
            rank_zero_info("There is no last checkpoint yet, so training starts anew, at step 1.")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to evaluate an untrained model.

        Raises:
            CheckpointError: there is no checkpoint.
        """
        if trainer.state.fn != "fit" and self._is_missing(trainer):
            raise CheckpointError(
                "`ckpt_path` is 'last', and there is no last checkpoint, so the model would be an untrained one. Give "
                "the checkpoint's file, or `default_root_dir`, logger and checkpoint callback of the run that saved it."
            )

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def _is_missing(self, trainer: Trainer) -> bool:
        asked, self.asked = self.asked, False
        return asked and trainer.ckpt_path is None
