"""The callback that writes the results of ``validate`` and ``test``."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lambdapo.callbacks.run import run_directory
from lightning_lambdapo.datatypes import PromptBatch
from lightning_lambdapo.distributed.parallel import gather_on_first_rank
from lightning_lambdapo.evaluation.results import Outcome, results, write

_SPLITS = {"validate": "val", "test": "test"}
_PACKAGES = ("lightning-lambdapo", "torch", "transformers")


class EvaluationReport(Callback):
    """Writes ``results.json`` and ``results.md`` at the end of ``Trainer.validate`` and ``Trainer.test``.

    They contain avg@n, pass@k, maj@k, truncated share, completion length and reward parts with bootstrap intervals over
    prompts. If the data has a column ``subject``, they contain the same by subject. They also contain the settings and,
    in the JSON file, each prompt's outcome. Validation inside ``fit`` writes nothing. ``lambdapo validate`` and
    ``lambdapo test`` add this callback themselves.

    Args:
        stem: name of the files without extension.
    """

    def __init__(self, stem: str = "results") -> None:
        self.stem = stem
        self._outcomes: list[Outcome] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the outcomes of an earlier stage."""
        self._outcomes = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the outcomes of this rank's prompts."""
        if isinstance(outputs, Mapping):
            self._outcomes += outputs.get("outcomes", [])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, unless this is a validation inside ``fit``."""
        self._write(trainer, pl_module)

    # The test set is treated the same way.
    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage = str(trainer.state.fn.value) if trainer.state.fn is not None else ""
        if stage not in _SPLITS:
            return
        outcomes = [each for part in gather_on_first_rank(self._outcomes) for each in part]
        self._outcomes = []
        if not outcomes:
            rank_zero_warn(
                f"EvaluationReport has nothing to report: the module's {stage} step returned no `outcomes`. That "
                "of LambdaPOModule returns them."
            )
            return
        if trainer.is_global_zero:
            settings = self._settings(trainer, pl_module, stage)
            files = write(results(outcomes, settings["k"], settings), run_directory(trainer), self.stem)
            rank_zero_info(f"The results are in {' and '.join(map(str, files))}.")

    def _settings(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Any]:
        """What was evaluated, and how."""
        own = getattr(pl_module, "evaluation_settings", None)
        describe = getattr(getattr(trainer, "datamodule", None), "describe", None)
        return {
            "stage": stage,
            "k": [1],
            **({} if own is None else own()),
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            **({} if describe is None else describe(_SPLITS[stage])),
            "versions": {name: version(name) for name in _PACKAGES},
        }
