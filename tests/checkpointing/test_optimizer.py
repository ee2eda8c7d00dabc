"""A run that is resumed with another optimizer, or with other arguments of it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from small import Rows, config_file, module, trainer
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from lightning_lambdapo import AdapterConfig, LambdaPOModule, RolloutCheckpoint
from lightning_lambdapo.checkpointing.files import CheckpointError
from lightning_lambdapo.commands.main import main

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
Factory = Callable[[Any], Any]


class OwnAdamW(AdamW):
    """The same kind of state."""


class Momentum(Optimizer):
    """Another kind of state, with the arguments of AdamW."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {**AdamW([torch.zeros(1)]).defaults, "lr": 1e-2})


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-2)


def two_groups(parameters: Any) -> Optimizer:
    first, *others = parameters
    return AdamW([{"params": [first], "lr": 1e-3}, {"params": others}], lr=1e-2)


def warmup_and_cosine(optimizer: Optimizer) -> LRScheduler:
    parts: list[LRScheduler] = [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, 8)]
    return SequentialLR(optimizer, parts, milestones=[2])


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    """Changes momentum too."""
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=10)


def cycle(optimizer: Optimizer) -> LRScheduler:
    """Sets the initial rate itself."""
    return CyclicLR(optimizer, base_lr=0.001, max_lr=0.1, step_size_up=3, cycle_momentum=False)


def run(path: Path, base: str, steps: int, *, resume: Path | None = None, **settings: Any) -> tuple[Path, Optimizer]:
    """Train to a number of steps. The last checkpoint and the optimizer come back."""
    strategy = settings.pop("strategy", None)
    model = module(base, **({"lora": AdapterConfig(r=4), "optimizer": adamw} | settings))
    callback = RolloutCheckpoint(every_n_rollouts=2, dirpath=path)
    options: dict[str, Any] = {"callbacks": [callback], "enable_checkpointing": True, "max_steps": steps}
    built = trainer(path, **options, **({} if strategy is None else {"strategy": strategy}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        built.fit(model, Rows(batch_size=4), ckpt_path=resume)
    return path / "last.ckpt", built.optimizers[0]


def of_an_earlier_release(path: Path) -> Path:
    """The same checkpoint without what this release notes of the optimizer."""
    held = torch.load(path, weights_only=True)
    del held["lambdapo"]["optimizer"]
    torch.save(held, path.with_name("earlier.ckpt"))
    return path.with_name("earlier.ckpt")


@pytest.mark.parametrize("release", ["this", "earlier"])
@pytest.mark.parametrize(
    "scheduler", [None, warmup_and_cosine, one_cycle, cycle, lambda each: LambdaLR(each, lambda _: 0.5)]
)
@pytest.mark.parametrize("optimizer", [adamw, two_groups])
def test_the_same_settings_warn_of_nothing(
    base: str, tmp_path: Path, release: str, scheduler: Factory | None, optimizer: Factory
) -> None:
    """Warnings are errors in these tests."""
    settings: dict[str, Any] = {"optimizer": optimizer, "lr_scheduler": scheduler}
    last, _ = run(tmp_path, base, 2, **settings)
    run(tmp_path, base, 4, resume=last if release == "this" else of_an_earlier_release(last), **settings)


@pytest.mark.parametrize("release", ["this", "earlier"])
@pytest.mark.parametrize("scheduler", [None, warmup_and_cosine])
def test_the_checkpoints_arguments_stay_with_a_warning(
    base: str, tmp_path: Path, release: str, scheduler: Factory | None
) -> None:
    last, _ = run(tmp_path, base, 2, lr_scheduler=scheduler)
    source = last if release == "this" else of_an_earlier_release(last)

    def other(parameters: Any) -> Optimizer:
        return AdamW(parameters, lr=0.5, betas=(0.8, 0.999))

    text = (
        r"betas=\[0.9, 0.999\] stays, and betas=\[0.8, 0.999\] has no effect, lr=0.01 stays, and lr=0.5 has no effect.*"
        "start a new run"
    )
    with pytest.warns(UserWarning, match=text) as told:
        last, held = run(tmp_path, base, 4, resume=source, optimizer=other, lr_scheduler=scheduler)
    assert len([each for each in told if "has no effect" in str(each.message)]) == 1
    assert held.param_groups[0].get("initial_lr", held.param_groups[0]["lr"]) == 0.01
    noted = torch.load(last, weights_only=True)["lambdapo"]["optimizer"]["groups"]
    assert (noted[0]["lr"], noted[0]["betas"]) == (0.01, [0.9, 0.999]), "what stayed is what the next checkpoint notes"


@pytest.mark.parametrize("release", ["this", "earlier"])
@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda each: torch.optim.SGD(each, lr=1e-2), r"torch\.optim\.sgd\.SGD, which is given"),
        (torch.optim.NAdam, r"torch\.optim\.nadam\.NAdam, which is given"),
        (two_groups, "has 1 groups of parameters, and the one that is given has 2"),
    ],
)
def test_another_kind_of_optimizer_is_refused(
    base: str, tmp_path: Path, release: str, optimizer: Factory, reason: str
) -> None:
    last, _ = run(tmp_path, base, 2)
    source = last if release == "this" else of_an_earlier_release(last)
    with pytest.raises(CheckpointError, match=rf"{source.name} cannot be used: its optimizer .*{reason}") as refused:
        run(tmp_path / "more", base, 4, resume=source, optimizer=optimizer)
    assert "Give the `optimizer` of the run that wrote it" in str(refused.value)
    if release == "this" and optimizer is not two_groups:
        assert "torch.optim.adamw.AdamW" in str(refused.value)
    assert not (tmp_path / "more").exists()


def test_a_class_of_the_same_kind_goes_on(base: str, tmp_path: Path) -> None:
    last, _ = run(tmp_path, base, 2)
    with pytest.warns(UserWarning, match=r"goes on from the checkpoint's torch\.optim\.adamw\.AdamW.*OwnAdamW here"):
        run(tmp_path, base, 4, resume=last, optimizer=lambda each: OwnAdamW(each, lr=1e-2))
    with pytest.raises(CheckpointError, match="Momentum, which is given, cannot go on from"):
        run(tmp_path, base, 6, resume=tmp_path / "last.ckpt", optimizer=Momentum)


def test_adam_goes_on_as_the_adamw_of_the_checkpoint(base: str, tmp_path: Path) -> None:
    last, _ = run(tmp_path, base, 2)
    with pytest.warns(UserWarning, match=r"checkpoint's torch\.optim\.adamw\.AdamW.*weight_decay=0.01 stays"):
        run(tmp_path, base, 4, resume=last, optimizer=lambda each: Adam(each, lr=1e-2))


def test_shards_are_compared_before_they_are_loaded(base: str, tmp_path: Path) -> None:
    def sharding() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=True)

    last, _ = run(tmp_path, base, 2, strategy=sharding())
    assert last.is_dir()
    run(tmp_path, base, 4, resume=last, strategy=sharding())
    with pytest.warns(UserWarning, match=r"lr=0.01 stays, and lr=0.5 has no effect"):
        _, held = run(tmp_path, base, 4, resume=last, strategy=sharding(), optimizer=lambda each: AdamW(each, lr=0.5))
    assert held.param_groups[0]["lr"] == 0.01
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt cannot be used: its optimizer is torch\.optim\.adamw\.AdamW"
    ):
        run(tmp_path, base, 4, resume=last, strategy=sharding(), optimizer=torch.optim.SGD)
    torch.distributed.destroy_process_group()


def test_only_training_compares_optimizers(base: str, tmp_path: Path) -> None:
    last, _ = run(tmp_path, base, 2)
    model: LambdaPOModule = module(base, lora=AdapterConfig(r=4), optimizer=torch.optim.SGD)
    built = trainer(tmp_path, limit_val_batches=1, max_steps=1)
    built.validate(model, Rows(batch_size=4), ckpt_path=last, verbose=False)
    built.fit(model, Rows(batch_size=4))


def test_on_the_command_line(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file(base, tmp_path)
    main(["fit", f"--config={file}"])
    last = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    more = ["fit", f"--config={file}", f"--ckpt_path={last}", "--trainer.max_epochs=2"]
    with pytest.warns(UserWarning, match=r"lr=0.01 stays, and lr=0.5 has no effect"):
        main([*more, "--model.optimizer.lr=0.5"])
    sgd = "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}"
    monkeypatch.setattr("sys.argv", ["lambdapo", *more, f"--model.optimizer={sgd}"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    told = capsys.readouterr().err
    sentence = f"lambdapo fit: error: The checkpoint {last} cannot be used: its optimizer is torch.optim.adamw.AdamW"
    assert sentence in told
    assert "Traceback" not in told
