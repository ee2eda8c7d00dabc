import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_lambdapo.callbacks.checkpoint import RolloutCheckpoint
from lightning_lambdapo.data import DataSource, LambdaPODataModule, PromptLoader, PromptSampler
from lightning_lambdapo.datatypes import PromptBatch


def order(count: int, epoch: int, *, world: int = 1, batch_size: int = 2, **settings: Any) -> list[list[int]]:
    """Global batches of an epoch, each rank's share in rank order."""
    shares = []
    for rank in range(world):
        sampler = PromptSampler(
            list(range(count)),  # type: ignore[arg-type]
            batch_size=batch_size,
            num_replicas=world,
            rank=rank,
            **({"training": True} | settings),
        )
        sampler.set_epoch(epoch)
        mine = list(sampler)
        assert len(mine) == len(sampler)
        shares.append([mine[i : i + batch_size] for i in range(0, len(mine), batch_size)])
    longest = max(map(len, shares))
    return [[index for share in shares if step < len(share) for index in share[step]] for step in range(longest)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_global_batches_are_the_same_for_any_world_size(world: int) -> None:
    size = 12
    for epoch in range(3):
        alone = order(50, epoch, batch_size=size)
        shared = order(50, epoch, world=world, batch_size=size // world)
        assert [set(batch) for batch in alone] == [set(batch) for batch in shared]
        assert len(alone) == 4
        assert all(len(set(batch)) == size for batch in shared)


def test_shuffling_is_a_function_of_seed_and_epoch() -> None:
    assert order(9, 0) == order(9, 0)
    assert order(9, 0) != order(9, 1)
    assert order(9, 0) != order(9, 0, seed=1)
    assert [index for batch in order(8, 0, shuffle=False) for index in batch] == list(range(8))
    seen = {index for epoch in range(30) for batch in order(9, epoch) for index in batch}
    assert seen == set(range(9))  # what one epoch omits, another deals


def test_evaluation_leaves_nothing_out_and_repeats_nothing() -> None:
    for world in (1, 2, 3):
        dealt = sorted(index for batch in order(11, 0, world=world, training=False) for index in batch)
        assert dealt == [*range(11), *[11] * (-11 % world)]  # 11: a place where a rank has no row


def test_a_resumed_epoch_goes_on_and_the_next_is_whole() -> None:
    sampler = PromptSampler(list(range(10)), batch_size=2, training=True)  # type: ignore[arg-type]
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.resume(3, 2)
    assert list(sampler) == whole[4:]
    assert len(sampler) == 10
    sampler.set_epoch(4)
    assert len(list(sampler)) == 10


def test_too_few_prompts_for_a_batch() -> None:
    with pytest.raises(ValueError, match=r"3 training prompts do not fill one batch of 2 prompts on 2 rank"):
        order(3, 0, world=2)


class Witness(LightningModule):
    """Notes which prompts it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tiny.tokenizer()
        self.layer_norm = torch.nn.LayerNorm(1)
        self.seen: list[list[int]] = []
        self.automatic_optimization = False

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen.append(batch.prompt_ids.tolist())
        self.optimizers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """There is no validation data."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def source(path: Path, count: int = 10) -> DataSource:
    file = path / f"rows{count}.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(count)))
    return DataSource(path=str(file))


def trainer(path: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    return Trainer(**(quiet | {"default_root_dir": path, "enable_checkpointing": False} | settings))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("at", [2, 5, 8])
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:.*fork.* may lead to deadlocks:DeprecationWarning")
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path: Path, at: int, num_workers: int) -> None:
    """Mid-epoch, exactly at an epoch's end, and in epoch 2, with shuffling, also where workers run ahead."""

    def run(model: Witness, *, resume: Path | None = None, **settings: Any) -> list[list[int]]:
        data = LambdaPODataModule(train=source(tmp_path), batch_size=2, seed=4, num_workers=num_workers)
        trainer(tmp_path, **settings).fit(model, data, ckpt_path=resume)
        return model.seen

    whole = run(Witness(), max_epochs=3)
    assert len(whole) == 15
    stopped = Witness()
    saver = RolloutCheckpoint(
        every_n_rollouts=at, dirpath=tmp_path / "saved", filename="stopped", auto_insert_metric_name=False
    )
    built = trainer(tmp_path, max_steps=at, callbacks=[saver], enable_checkpointing=True)
    built.fit(stopped, LambdaPODataModule(train=source(tmp_path), batch_size=2, seed=4, num_workers=num_workers))
    rest = run(Witness(), resume=tmp_path / "saved" / "stopped.ckpt", max_epochs=3)
    assert stopped.seen + rest == whole


def test_changed_data_or_batch_size_warns_on_resume(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Witness(), LambdaPODataModule(train=source(tmp_path), batch_size=2))
    first.save_checkpoint(tmp_path / "a.ckpt")
    for data, message in (
        (LambdaPODataModule(train=source(tmp_path), batch_size=5), "took 2 prompts per step, this one takes 5"),
        (LambdaPODataModule(train=source(tmp_path, 8), batch_size=2), "training data is not that of the checkpoint"),
    ):
        with pytest.warns(UserWarning, match=message):
            trainer(tmp_path, max_epochs=2).fit(Witness(), data, ckpt_path=tmp_path / "a.ckpt")


def test_over_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    data = LambdaPODataModule(train=source(tmp_path, 12), batch_size=2, max_prompt_length=4, tokenizer=tiny.tokenizer())
    with pytest.warns(UserWarning, match=r"2 of 12 prompts .* max_prompt_length = 4 tokens and are omitted"):
        data.setup("fit")
    assert data.dropped == {"train": 2}
    assert [row["prompt_id"] for row in data.train_rows] == list(range(10))
    short = LambdaPODataModule(train=source(tmp_path, 12), max_prompt_length=3, tokenizer=tiny.tokenizer())
    with pytest.raises(ValueError, match=r"All 12 prompts .* have more than max_prompt_length = 3"):
        short.setup("fit")


def test_stages_and_their_sources(tmp_path: Path) -> None:
    data = LambdaPODataModule(val=source(tmp_path), batch_size=4, eval_batch_size=3, tokenizer=tiny.tokenizer())
    for stage, loader in (
        ("validate", data.val_dataloader),
        ("test", data.test_dataloader),
        ("predict", data.predict_dataloader),
    ):
        data.setup(stage)
        batches = list(loader())
        assert [len(batch.prompts) for batch in batches] == [3, 3, 3, 1]
        assert [int(i) for batch in batches for i in batch.prompt_ids] == list(range(10))
    with pytest.raises(ValueError, match=r"no data to fit on\. Set `data\.train`"):
        data.setup("fit")
    bare = LambdaPODataModule(train=source(tmp_path))
    with pytest.raises(ValueError, match="has no tokenizer"):
        bare.setup("fit")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        LambdaPODataModule(batch_size=0)


def test_training_loaders_have_a_length_and_a_position(tmp_path: Path) -> None:
    data = LambdaPODataModule(train=source(tmp_path, 11), batch_size=2, tokenizer=tiny.tokenizer())
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader, PromptLoader)
    assert len(loader) == 5
    batches = iter(loader)
    next(batches)
    next(batches)
    assert loader.state_dict() == {"epoch": 0, "batches": 2, "streams": 2}
