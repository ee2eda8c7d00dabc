"""What Lightning's trainer and callbacks offer beside training: it works, or an error says what to use instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner.tuning import Tuner
from small import Digits, Rows, equal, fit, module, trainer, weights
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, PolynomialLR, SequentialLR

from lightning_lambdapo import AdapterConfig, LambdaPOModule, PolicyConfig, RolloutCheckpoint
from lightning_lambdapo.rollout.sampler import RolloutSampler

LORA = AdapterConfig(r=4)


@pytest.fixture
def no_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RolloutSampler, "complete", lambda *_, **__: pytest.fail("a rollout was paid for"))


class Averages(EMAWeightAveraging):
    """Keeps the last average and the number of tensors in it."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        average: Any = self._average_model
        self.average = weights(average.module)
        super().on_train_end(trainer, pl_module)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": LORA}, {"lora": LORA, "algorithm": {"log_kl": True}}, {"algorithm": {"kl_coef": 0.1}}],
    ids=["full", "lora", "lora and KL", "full and KL"],
)
def test_averaged_weights_resume(base: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The average of the resumed run is that of the uninterrupted run, and checkpoints do not hold the base."""

    def run(name: str, epochs: int, resume: str | None = None) -> tuple[LambdaPOModule, Averages]:
        path, averages = tmp_path / name, Averages(decay=0.5)
        saving = RolloutCheckpoint(every_n_rollouts=2, dirpath=path, save_top_k=-1)
        built = trainer(path, callbacks=[averages, saving], enable_checkpointing=True, max_epochs=epochs)
        model = module(base, **settings)
        built.fit(model, Rows(batch_size=4), ckpt_path=resume)
        return model, averages

    model, whole = run("whole", 2)
    run("parts", 1)
    last = tmp_path / "parts" / "last.ckpt"
    entries = torch.load(last, weights_only=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(entries["state_dict"]) == set(entries["current_model_state"]) == trained
    _, resumed = run("parts", 2, str(last))
    assert equal({name: resumed.average[name] for name in trained}, {name: whole.average[name] for name in trained})
    again = LambdaPOModule.load_from_checkpoint(last, rewards=[Digits()], optimizer=model.optimizer_factory)
    assert equal({name: weights(again)[name] for name in trained}, {name: whole.average[name] for name in trained})


@pytest.mark.usefixtures("no_rollout")
@pytest.mark.parametrize("callback", [EMAWeightAveraging(), StochasticWeightAveraging(1e-3)])
def test_quantised_weights_have_no_average(base: str, tmp_path: Path, callback: Callback) -> None:
    model = module(base, lora=LORA, policy=PolicyConfig(base, quantization="nf4"))
    with pytest.raises(ValueError, match="averages the frozen base, and the bytes of quantised weights have no aver"):
        trainer(tmp_path, callbacks=[callback]).fit(model, Rows(batch_size=4))


@pytest.mark.usefixtures("no_rollout")
@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (BatchSizeFinder(), "BatchSizeFinder cannot try batch sizes: .*Set `max_tokens_per_micro_batch`"),
        (LearningRateFinder(), "LearningRateFinder raises the rate .*Compare rates with `lambdapo compare"),
    ],
)
def test_finders_are_refused(base: str, tmp_path: Path, callback: Callback, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callbacks=[callback]).fit(module(base), Rows(batch_size=4))
    tuner = Tuner(trainer(tmp_path))
    start: Any = tuner.scale_batch_size if isinstance(callback, BatchSizeFinder) else tuner.lr_find
    with pytest.raises(ValueError, match=message):
        start(module(base), datamodule=Rows(batch_size=4))


@pytest.mark.usefixtures("no_rollout")
def test_clipping_by_the_trainer(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradient_clip_val=0\.5\) has no effect"):
        trainer(tmp_path, gradient_clip_val=0.5).fit(module(base), Rows(batch_size=4))


def test_zero_is_lightnings_word_for_no_clipping(base: str, tmp_path: Path) -> None:
    assert len(fit(tmp_path, module(base), gradient_clip_val=0)) == 4


class Seen(Callback):
    """The prompts of every step and of every validation batch."""

    def __init__(self) -> None:
        self.training: list[list[str]] = []
        self.validation: list[list[str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.training.append(batch.prompts)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        self.validation.append(batch.prompts)


def test_overfitting_repeats_the_first_batches(base: str, tmp_path: Path) -> None:
    seen = Seen()
    trainer(tmp_path, overfit_batches=2, max_epochs=2, callbacks=[seen]).fit(module(base), Rows(batch_size=2))
    first = [["0+0=", "0+1="], ["0+2=", "0+3="]]
    assert seen.training == first + first
    assert seen.validation
    assert seen.validation[0][0] == "0+0="


def rising(length: int) -> Any:
    return lambda optimizer: OneCycleLR(optimizer, max_lr=1e-2, total_steps=length)


def after_warmup(length: int) -> Any:
    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        parts = [LambdaLR(optimizer, lambda _: 0.5), OneCycleLR(optimizer, max_lr=1e-2, total_steps=length)]
        return SequentialLR(optimizer, parts, milestones=[1])

    return make


@pytest.mark.usefixtures("no_rollout")
@pytest.mark.parametrize(
    ("schedule", "limits", "updates", "needed"),
    [
        (rising(4), {}, 8, 8),  # an epoch of four training steps of two updates
        (rising(4), {"max_epochs": 2}, 16, 16),
        (rising(5), {"max_steps": 5}, 6, 6),  # which counts updates, and training steps are whole
        (after_warmup(6), {}, 8, 7),
    ],
)
def test_a_schedule_that_would_end_in_an_error(
    base: str, tmp_path: Path, schedule: Any, limits: dict[str, int], updates: int, needed: int
) -> None:
    model = module(base, lr_scheduler=schedule, updates_per_rollout=2, epochs_per_rollout=2)
    message = (
        rf"OneCycleLR with total_steps=\d, and training makes {updates} updates, 2 in .*total_steps to {needed} or"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **limits).fit(model, Rows(batch_size=4))


def test_the_second_part_of_a_schedule_starts_later(base: str, tmp_path: Path) -> None:
    model = module(base, lr_scheduler=after_warmup(7), updates_per_rollout=2, epochs_per_rollout=2)
    trainer(tmp_path).fit(model, Rows(batch_size=4))
    assert model.rollout_step == 4


@pytest.mark.parametrize(("length", "limits"), [(8, {}), (4, {"max_steps": 4}), (6, {"max_steps": 5})])
def test_a_schedule_that_is_long_enough(base: str, tmp_path: Path, length: int, limits: dict[str, int]) -> None:
    model = module(base, lr_scheduler=rising(length), updates_per_rollout=2, epochs_per_rollout=2)
    trainer(tmp_path, **limits).fit(model, Rows(batch_size=4))
    assert model.rollout_step == length // 2


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("CosineAnnealingLR", lambda optimizer: CosineAnnealingLR(optimizer, 4)),
        ("PolynomialLR", lambda optimizer: PolynomialLR(optimizer, 4)),
    ],
)
def test_a_schedule_that_ends_early_is_named(base: str, tmp_path: Path, name: str, schedule: Any) -> None:
    """Its length is in updates, of which there are twice as many as training steps."""
    model = module(base, lr_scheduler=schedule, updates_per_rollout=2, epochs_per_rollout=2)
    with pytest.warns(
        UserWarning, match=f"`lr_scheduler` is {name}, whose rate is lowest after 4 .*Set its length to 8"
    ):
        trainer(tmp_path).fit(model, Rows(batch_size=4))
