"""The command line: LightningCLI with this package's module and data as defaults, and more commands."""

import importlib
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lambdapo.callbacks.completions import CompletionsLogger
from lightning_lambdapo.callbacks.console import TrainingConsole
from lightning_lambdapo.callbacks.evaluation_report import EvaluationReport
from lightning_lambdapo.callbacks.last_checkpoint import LastCheckpoint, also_of_earlier_runs
from lightning_lambdapo.commands.mistakes import DEBUG, Parser, told_in_one_sentence
from lightning_lambdapo.commands.nested_options import nested_options
from lightning_lambdapo.commands.release_0_1 import upgraded_arguments
from lightning_lambdapo.commands.run_files import SavedConfig, keep_metrics
from lightning_lambdapo.distributed.lightning_internals import started_by_lightning
from lightning_lambdapo.functional.ranges import check_whole, path_text
from lightning_lambdapo.module import LambdaPOModule

#: Commands beyond Lightning's: the module of each, and what it does.
COMMANDS = {
    "compare": ("compare", "train with several estimators or settings and seeds, and report which helps"),
    "score": ("score", "judge a file of completions again, without a model"),
    "export": ("export", "write a trained policy for transformers or vLLM, with a model card"),
    "inspect-rollout": ("inspect_rollout", "show the rewards, pair weights and advantages of a training step"),
}


class LambdaPOCLI(LightningCLI):
    """``lambdapo fit|validate|test|predict --config FILE``.

    The model is a :class:`LambdaPOModule` or a subclass (``class_path``). The data is a :class:`LambdaPODataModule` or
    any other ``LightningDataModule``. Without a logger in the configuration, a run logs to CSV in
    ``<default_root_dir>/lightning_logs/version_N``.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make this package's classes the defaults, so that a config may omit their ``class_path``."""
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch. With null torch chooses. Tiny models are fastest with one.",
        )
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_lambdapo.LambdaPOModule"},
                "data": {"class_path": "lightning_lambdapo.LambdaPODataModule"},
            }
        )

    def before_instantiate_classes(self) -> None:
        """Apply ``num_threads`` before anything is computed, and read ``~`` in the trainer's paths as the home."""
        settings = self.config if self.subcommand is None else self.config[self.subcommand]
        for name in ("trainer", "ckpt_path"):
            if name in settings:
                settings[name] = _with_home(settings[name])
        threads = self._get(self.config, "num_threads")
        if threads is not None:
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add a CSV logger, a writer of results and a progress bar, if the configuration names none.

        Each step's row is on disk when the step ends. The writer is for ``validate``, ``test`` and ``predict``. The
        progress bar is for ``fit``, unless progress bars are switched off.
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

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """The subcommand's arguments. Earlier files are kept. The last checkpoint is found, or its absence noticed."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        keep_metrics(self.trainer)
        callbacks: list[Callback] = cast(Any, self.trainer).callbacks
        if arguments.get("ckpt_path") == "last":
            for each in callbacks:
                if isinstance(each, ModelCheckpoint) and not isinstance(each, LastCheckpoint):
                    also_of_earlier_runs(each)
            if not any(isinstance(each, LastCheckpoint) for each in callbacks):
                callbacks.append(LastCheckpoint())
        return arguments

    def after_fit(self) -> None:
        """Repeat the last validation if the run was killed in it and no training step is left."""
        run_state = getattr(self.model, "run_state", None)
        if run_state is not None and run_state.pending_validation:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            run_state.pending_validation = False

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, with ``null``, texts and numbers of list items in options that name a part."""
        with nested_options():
            super().parse_arguments(parser, args)
        seed = self.config[self.config["subcommand"]]["seed_everything"]
        if not isinstance(seed, bool):  # true chooses one
            check_whole("seed_everything", seed, 0, highest=2**32 - 1)  # the seeds that numpy takes

    def _parse_ckpt_path(self) -> None:
        """Do nothing: a checkpoint's hyper-parameters must not override file and command line."""


def _with_home(settings: Any) -> Any:
    """The trainer's settings with ``~/`` at the beginning of a text as the home directory."""
    if isinstance(settings, str):
        return path_text(settings) if settings.startswith("~") else settings
    if isinstance(settings, list):
        return [_with_home(each) for each in settings]
    if isinstance(settings, Namespace | dict):
        for name, value in list(vars(settings).items() if isinstance(settings, Namespace) else settings.items()):
            settings[name] = _with_home(value)
    return settings


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in str(record.msg)


class _Rehearsal(LambdaPOCLI):
    """Parses a command line and builds trainer, module and data, without weights or files."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def main(args: ArgsType = None) -> None:
    """Run the command line.

    A mistake in the settings is told in one sentence, with exit code 2. ``--debug`` adds the traceback.

    Args:
        args: arguments in place of ``sys.argv``, for tests and for use from Python, where errors are raised.
    """
    if args is not None:
        _main(args)
        return
    given = [each for each in sys.argv[1:] if each != "--debug"]
    if len(given) < len(sys.argv) - 1:
        os.environ[DEBUG] = "1"
    with told_in_one_sentence(" ".join(["lambdapo", *given[:1]])):
        _main(given)


def _main(args: ArgsType) -> None:
    grow_segments()
    given = args
    if isinstance(given, list) and given and given[0] in COMMANDS:
        _silence()
        importlib.import_module(f"lightning_lambdapo.commands.{COMMANDS[given[0]][0]}").main(given[1:])
        return
    if isinstance(given, list) and (new := upgraded_arguments(given)) != given:
        args = new
    _run(LambdaPOCLI, args)


def rehearse(args: list[str]) -> None:
    """Find mistakes in a command line of ``fit`` before anything is computed. Errors are those of ``main``."""
    logging.disable(logging.INFO)  # otherwise Lightning prints seeds and devices for every rehearsal
    try:
        _run(_Rehearsal, upgraded_arguments(args))
    finally:
        logging.disable(logging.NOTSET)


def _run(cli: type[LambdaPOCLI], args: ArgsType) -> None:
    _silence()
    if args is not None:
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    more = ", ".join(f"{name} ({what})" for name, (_, what) in COMMANDS.items())
    try:
        cli(
            LambdaPOModule,
            LightningDataModule,
            save_config_callback=SavedConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "lambdapo",
                "description": "LambdaPO for PyTorch Lightning. There are more commands than the subcommands below, "
                f"each with its own --help: {more}. --debug shows the traceback of a mistake in the settings.",
            },
            args=args,
        )
    except SIGTERMException as stop:  # a SystemExit that would count as success
        if started_by_lightning():
            raise  # otherwise Lightning's first rank would be killed by its own watch over the others
        raise SystemExit(128 + signal.SIGTERM) from stop


def grow_segments() -> None:
    """Let CUDA memory grow in place, because micro-batches of many sizes would leave holes. A user's setting stays.

    Torch reads the variable when CUDA starts. All releases from 2.6 read this name, and later ones the shorter one too.
    """
    if not any(f"PYTORCH_{name}ALLOC_CONF" in os.environ for name in ("", "CUDA_", "HIP_")):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _silence() -> None:
    for noise in (".*LeafSpec.* is deprecated", "`is_gradient_checkpointing` is deprecated"):
        warnings.filterwarnings("ignore", message=noise)  # from lightning and peft, not in the user's hands
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
