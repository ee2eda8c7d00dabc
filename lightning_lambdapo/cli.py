"""The command line: LightningCLI in subclass mode, with this package's module and data as defaults."""

import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_lambdapo.module import LambdaPOModule


class LambdaPOCLI(LightningCLI):
    """``lambdapo fit|validate|test|predict --config FILE``.

    The model is a :class:`LambdaPOModule` or a subclass (``class_path``), the data a :class:`LambdaPODataModule` or
    any other ``LightningDataModule``. Without a logger in the configuration a run logs to CSV, in
    ``<default_root_dir>/lightning_logs/version_N``.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make this package's classes the defaults, so that a config may leave their ``class_path`` out."""
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch; null leaves torch's choice. Tiny models are fastest with one.",
        )
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_lambdapo.LambdaPOModule"},
                "data": {"class_path": "lightning_lambdapo.LambdaPODataModule"},
            }
        )

    def before_instantiate_classes(self) -> None:
        """Apply ``num_threads`` before anything is computed."""
        threads = self._get(self.config, "num_threads")
        if threads is not None:
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to CSV where no logger is named; each step's row is on disk when the step ends."""
        trainer = self._get(self.config_init, "trainer")
        if trainer.get("logger") in (None, True):
            root = trainer.get("default_root_dir") or Path.cwd()
            kwargs.setdefault("logger", CSVLogger(root, flush_logs_every_n_steps=1))
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: a checkpoint's hyper-parameters must not override file and command line."""


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: arguments in place of ``sys.argv``, for tests and for use from Python.
    """
    for noise in (".*LeafSpec.* is deprecated", "`is_gradient_checkpointing` is deprecated"):
        warnings.filterwarnings("ignore", message=noise)  # lightning's and peft's own, nothing a user could change
    if args is not None:
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    LambdaPOCLI(
        LambdaPOModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=args,
    )
