"""What the command line does for several runs in one directory: files of the earlier ones are kept."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from lightning_lambdapo.runs.files import unused_path


class SavedConfig(SaveConfigCallback):
    """Writes ``config.yaml``, or ``config-1.yaml`` and so on if the directory has one of other settings.

    Loggers without a directory for each run, or with a fixed version, write several runs into one directory.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose a name and write the settings, once."""
        directory = trainer.log_dir  # a collective
        if not self.already_saved and directory is not None and "://" not in directory:
            name = self._unused_name(Path(directory)) if trainer.is_global_zero else None
            name = trainer.strategy.broadcast(name)
            self.already_saved = name is None
            self.config_filename = name or self.config_filename
        super().setup(trainer, pl_module, stage)

    def _unused_name(self, directory: Path) -> str | None:
        """A name that no file has. None if a file has these settings."""
        wanted = directory / self.config_filename
        new = self.parser.dump(self.config, skip_none=False)
        earlier = [wanted, *directory.glob(f"{wanted.stem}-*{wanted.suffix}")]
        if any(file.is_file() and file.read_text(encoding="utf-8") == new for file in earlier):
            return None
        return unused_path(wanted).name


def keep_metrics(trainer: Trainer) -> None:
    """Rename the ``metrics.csv`` of earlier runs, which a ``CSVLogger`` with a fixed version would delete."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            file = Path(logger.log_dir) / "metrics.csv"
            if "://" not in str(logger.log_dir) and file.is_file():
                file.rename(unused_path(file))
