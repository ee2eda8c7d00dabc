"""The command line: LightningCLI in subclass mode, this package's module and data being defaults; more commands."""

import importlib
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_lambdapo.callbacks.completions import CompletionsLogger
from lightning_lambdapo.callbacks.console import TrainingConsole
from lightning_lambdapo.callbacks.evaluation_report import EvaluationReport
from lightning_lambdapo.commands.release_0_1 import upgraded_arguments
from lightning_lambdapo.module import LambdaPOModule

#: Commands beyond Lightning's: the module that holds each, and what it does.
COMMANDS = {
    "compare": ("compare", "train with several estimators or settings and seeds, and report which helps"),
    "score": ("score", "judge a file of completions again, without a model"),
    "export": ("export", "write a trained policy for transformers or vLLM, with a model card"),
    "inspect-rollout": ("inspect_rollout", "show the rewards, pair weights and advantages of a training step"),
}


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
        """Log to CSV where no logger is named; each step's row is on disk when the step ends.

        And write what ``validate``, ``test`` and ``predict`` are for, where no callback of the configuration does, and
        show the progress of ``fit``, where no other progress bar is named and none switched off.
        """
        trainer = self._get(self.config_init, "trainer")
        if trainer.get("logger") in (None, True) and not trainer.get("barebones"):
            root = trainer.get("default_root_dir") or Path.cwd()
            kwargs.setdefault("logger", CSVLogger(root, flush_logs_every_n_steps=1))
        given = trainer.get("callbacks") or []
        callbacks = [*given] if isinstance(given, list) else [given]
        writer = {"validate": EvaluationReport, "test": EvaluationReport, "predict": CompletionsLogger}.get(
            self.subcommand or ""
        )
        if writer is not None and not any(isinstance(callback, writer) for callback in callbacks):
            kwargs.setdefault("callbacks", [*callbacks, writer()])
        wants_bar = trainer.get("enable_progress_bar") is not False and not trainer.get("barebones")
        if self.subcommand == "fit" and wants_bar and not any(isinstance(each, ProgressBar) for each in callbacks):
            kwargs.setdefault("callbacks", [*callbacks, TrainingConsole()])
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Make the last validation, where a run that was killed in it is taken up and has nothing left to train."""
        run_state = getattr(self.model, "run_state", None)
        if run_state is not None and run_state.pending_validation:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            run_state.pending_validation = False

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: a checkpoint's hyper-parameters must not override file and command line."""


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in str(record.msg)


class _Rehearsal(LambdaPOCLI):
    """Parses a command line and builds trainer, module and data, and leaves it at that: no weights, no files."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: arguments in place of ``sys.argv``, for tests and for use from Python.
    """
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given and given[0] in COMMANDS:
        _silence()
        importlib.import_module(f"lightning_lambdapo.commands.{COMMANDS[given[0]][0]}").main(given[1:])
        return
    if isinstance(given, list) and (new := upgraded_arguments(given)) != given:
        args = new
    _run(LambdaPOCLI, args)


def rehearse(args: list[str]) -> None:
    """Find what is wrong with a command line of ``fit`` before anything is computed: it ends as ``main`` would."""
    logging.disable(logging.INFO)  # Lightning's words on seeds and devices, once more for every rehearsal
    try:
        _run(_Rehearsal, upgraded_arguments(args))
    finally:
        logging.disable(logging.NOTSET)


def _run(cli: type[LambdaPOCLI], args: ArgsType) -> None:
    _silence()
    if args is not None:
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    more = ", ".join(f"{name} ({what})" for name, (_, what) in COMMANDS.items())
    cli(
        LambdaPOModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        parser_kwargs={
            "description": "LambdaPO for PyTorch Lightning. Beside the subcommands below there are, each with a --help "
            f"of its own: {more}."
        },
        args=args,
    )


def _silence() -> None:
    for noise in (".*LeafSpec.* is deprecated", "`is_gradient_checkpointing` is deprecated"):
        warnings.filterwarnings("ignore", message=noise)  # lightning's and peft's own, nothing a user could change
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
