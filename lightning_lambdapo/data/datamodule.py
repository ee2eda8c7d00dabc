"""The LightningDataModule: sources in, batches of prompts out, in an order that a resumed run continues."""

import hashlib
import warnings
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lightning_lambdapo.config import changed_settings
from lightning_lambdapo.data.collate import PromptCollator
from lightning_lambdapo.data.sampler import PromptLoader, PromptSampler, SequentialPromptSampler
from lightning_lambdapo.data.sources import DataSource, Row, load_rows
from lightning_lambdapo.data.templates import PromptTemplate
from lightning_lambdapo.datatypes import PromptBatch
from lightning_lambdapo.functional.ranges import check_seed, check_whole

_ABSENT = "\0absent"
_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class LambdaPODataModule(LightningDataModule):
    """Batches of prompts for training, validation, test and prediction.

    Prompts longer than ``max_prompt_length`` are dropped and counted, never truncated. The order of training prompts
    depends only on seed and epoch. Checkpoints save the position in it.

    Args:
        train: training problems.
        val: validation problems.
        test: test problems. None takes ``val``.
        predict: problems to complete. None takes ``test`` or ``val``.
        batch_size: prompts per rank and training step.
        eval_batch_size: prompts per rank and step elsewhere. None takes ``batch_size``.
        max_prompt_length: longest prompt, in tokens.
        template: how a problem becomes a prompt.
        tokenizer: None takes that of the module being trained.
        seed: seed of the order of training prompts.
        shuffle: False keeps the data's own order.
        num_workers: processes that tokenise.

    Attributes:
        dropped: number of prompts that were too long, by split.
        longest: tokens of the longest prompt that was kept, by split.
    """

    def __init__(
        self,
        train: DataSource | None = None,
        val: DataSource | None = None,
        test: DataSource | None = None,
        predict: DataSource | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_prompt_length: int = 512,
        template: PromptTemplate = PromptTemplate(),
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        check_whole("batch_size", batch_size, 1)
        check_whole("eval_batch_size", self.eval_batch_size, 1)
        check_whole("max_prompt_length", max_prompt_length, 1)
        check_whole("num_workers", num_workers, 0)
        check_seed("data.seed", seed)
        self.sources = {
            "train": train,
            "val": val,
            "test": test or val,
            "predict": predict or test or val,
        }
        self.batch_size = batch_size
        self.max_prompt_length = max_prompt_length
        self.template = template
        self.tokenizer = tokenizer
        self.seed = seed
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.dropped: dict[str, int] = {}
        self.longest: dict[str, int] = {}
        self._rows: dict[str, list[Row]] = {}
        self._fingerprint = ""

    @property
    def train_rows(self) -> list[Row]:
        """The training problems, once ``setup`` has run."""
        return self._rows.get("train", [])

    def rows_of(self, split: str) -> list[Row]:
        """The problems of ``"train"``, ``"val"``, ``"test"`` or ``"predict"``, once ``setup`` has run for them."""
        return self._rows.get(split, [])

    def training_references(self) -> list[str]:
        """The reference solutions of the training problems. If no training is set up, their source is loaded for it."""
        source = self.sources["train"]
        rows = self.train_rows or (self._load("train", source) if source is not None else [])
        return [row["reference"] for row in rows if str(row.get("reference") or "").strip()]

    @property
    def seeds(self) -> dict[str, int]:
        """Seeds of the order of training prompts and of each generated source."""
        generated = {
            f"data_{name}": source.seed for name, source in self.sources.items() if source and source.generated
        }
        return {"data_order": self.seed} | generated

    def setup(self, stage: str) -> None:
        """Load the stage's sources, and drop prompts that are too long.

        Raises:
            ValueError: no tokenizer, no source for the stage, or no prompt that is short enough.
        """
        for split in _STAGES[stage]:
            source = self.sources[split]
            if source is not None and split not in self._rows:
                self._rows[split] = self._load(split, source)
        required = _STAGES[stage][0]
        if stage == "fit" and self.train_rows and not self._fingerprint:
            self._fingerprint = _fingerprint(self.train_rows)
        if required not in self._rows:
            raise ValueError(f"There is no data to {stage} on. Set `data.{required}`.")

    def train_dataloader(self) -> DataLoader[PromptBatch]:
        """Batches of training prompts. A resumed run continues at its checkpoint's position."""
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> DataLoader[PromptBatch] | list[Any]:
        """Batches of validation prompts, in the data's order. An empty list without a validation source."""
        if "val" in self._rows:
            return self._loader("val", self.eval_batch_size)
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # intended
        return []

    def test_dataloader(self) -> DataLoader[PromptBatch]:
        """Batches of test prompts, in the data's order."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Batches of prompts to complete, in the data's order."""
        return self._loader("predict", self.eval_batch_size)

    def describe(self, split: str) -> dict[str, Any]:
        """Where a split's problems come from and how they are worded, as plain data for a report."""
        source = self.sources[split]
        return {
            "data": {} if source is None else changed_settings(source),
            "template": changed_settings(self.template),
            "left_out_prompts": self.dropped.get(split) or None,
        }

    def state_dict(self) -> dict[str, Any]:
        """The data and batch size that the loader's saved position belongs to."""
        if self.trainer is None or not self.train_rows:
            return {}
        return {"data": self._fingerprint, "global_batch": self.batch_size * self.trainer.world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the data or the batch size has changed since the checkpoint."""
        if not state_dict:
            return
        if self.train_rows and state_dict["data"] != self._fingerprint:
            warnings.warn(
                "The training data is not that of the checkpoint. The run continues at the same place in the new data.",
                stacklevel=2,
            )
        world_size = 1 if self.trainer is None else self.trainer.world_size
        if state_dict["global_batch"] != self.batch_size * world_size:
            warnings.warn(
                f"The checkpoint's run took {state_dict['global_batch']} prompts per step, this one takes "
                f"{self.batch_size * world_size}. It does not continue with the same prompts.",
                stacklevel=2,
            )

    def _load(self, split: str, source: DataSource) -> list[Row]:
        collator = self._collator()
        rows = load_rows(source)
        lengths = [len(collator.encode(row)[1]) for row in rows]
        kept = [row for row, length in zip(rows, lengths, strict=True) if length <= self.max_prompt_length]
        self.longest[split] = max((length for length in lengths if length <= self.max_prompt_length), default=0)
        self.dropped[split] = len(rows) - len(kept)
        if not kept:
            raise ValueError(
                f"All {len(rows)} prompts of {source.name} have more than max_prompt_length = "
                f"{self.max_prompt_length} tokens. Raise it."
            )
        if self.dropped[split]:
            rank_zero_warn(
                f"{self.dropped[split]} of {len(rows)} prompts of {source.name} ({split}) have more than "
                f"max_prompt_length = {self.max_prompt_length} tokens and are omitted."
            )
        return kept

    def _loader(self, split: str, batch_size: int) -> DataLoader[PromptBatch]:
        rows = _Rows(self._rows[split])
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0  # the same prompts in every epoch
        sampler = (SequentialPromptSampler if overfit else PromptSampler)(
            rows,
            batch_size=batch_size,
            training=split == "train",
            num_replicas=1 if self.trainer is None else self.trainer.world_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            seed=self.seed,
            shuffle=self.shuffle and not overfit,
        )
        # Only training has a position to save, and Lightning rebuilds prediction loaders around its own sampler.
        loader: type[DataLoader[Any]] = PromptLoader if split == "train" else DataLoader
        return loader(
            rows,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=_PresentRows(self._collator()),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _collator(self) -> PromptCollator:
        tokenizer = self.tokenizer
        if tokenizer is None:
            module = None if self.trainer is None else self.trainer.lightning_module
            tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "LambdaPODataModule has no tokenizer: give it one, or train a module that has a `tokenizer`."
            )
        return PromptCollator(tokenizer, self.template, self.max_prompt_length)


class _Rows(Dataset[Row]):
    """A list as a Dataset. An index past its end is a place where a rank has no row."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index] if index < len(self.rows) else self.rows[0] | {_ABSENT: True}


class _PresentRows:
    """``collate_fn`` that omits the places without a row, so that a batch may be empty."""

    def __init__(self, collator: PromptCollator) -> None:
        self.collator = collator

    def __call__(self, rows: list[Row]) -> PromptBatch:
        present = [row for row in rows if _ABSENT not in row]
        return self.collator(present) if present else self.collator(rows[:1]).select([])


def _fingerprint(rows: list[Row]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(f"{row['prompt_id']}\0{row['prompt']}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
