"""Several runs of the command line in one directory, and a last checkpoint that is not there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from small import Rows, config_file, module, trainer

from lightning_lambdapo import AdapterConfig, RolloutCheckpoint
from lightning_lambdapo.callbacks.console import _files
from lightning_lambdapo.checkpointing.files import CheckpointError
from lightning_lambdapo.commands.export import find_checkpoint
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.distributed.lightning_internals import started_by_lightning
from lightning_lambdapo.runs.files import read_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]
LOGGERS: dict[str, tuple[str, str]] = {
    "none": ("false", ""),
    "csv": ("lightning.pytorch.loggers.CSVLogger", ""),
    "csv of a fixed version": ("lightning.pytorch.loggers.CSVLogger", "version: mine, flush_logs_every_n_steps: 1"),
    "tensorboard": ("lightning.pytorch.loggers.TensorBoardLogger", ""),
    "tensorboard of a fixed version": ("lightning.pytorch.loggers.TensorBoardLogger", "version: 3"),
    "wandb": ("lightning.pytorch.loggers.WandbLogger", "offline: true"),
}


def logging(name: str, root: Path) -> str:
    path, options = LOGGERS[name]
    if path == "false":
        return "--trainer.logger=false"
    arguments = ", ".join(filter(None, [f"save_dir: {root}", options]))
    return f"--trainer.logger={{class_path: {path}, init_args: {{{arguments}}}}}"


@pytest.fixture
def wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))


@pytest.mark.usefixtures("wandb_offline")
@pytest.mark.parametrize("name", LOGGERS)
def test_the_same_command_resumes_with_every_logger(base: str, tmp_path: Path, name: str) -> None:
    """Four steps, four more, and a test of what was trained."""
    if name == "wandb":
        wandb = pytest.importorskip("wandb")
    file, root = config_file(base, tmp_path), tmp_path / "runs"
    root.mkdir()
    common = [f"--config={file}", f"--trainer.default_root_dir={root}", logging(name, root), "--ckpt_path=last"]
    for epochs in (1, 2):
        main(["fit", *common, f"--trainer.max_epochs={epochs}"])
        if name == "wandb":
            wandb.finish()
    last = find_checkpoint(root)
    assert torch.load(last, weights_only=True)["lambdapo"]["rollout_step"] == 8
    main(["test", *common, f"--data.test={{path: {tmp_path / 'rows.jsonl'}, limit: 4}}"])
    if name == "wandb":
        wandb.finish()
    results = [file.read_text() for file in root.rglob("results.json")]
    assert len(results) == 1
    assert f'"checkpoint": "{last}"' in results[0]
    configs = [file.name for file in root.rglob("config*.yaml")]
    assert len(configs) == len(set(configs)) * (3 if name in ("csv", "tensorboard") else 1) == 3


def test_settings_and_metrics_of_earlier_runs_are_kept(base: str, tmp_path: Path) -> None:
    file = config_file(base, tmp_path)
    common = [f"--config={file}", logging("csv of a fixed version", tmp_path), "--ckpt_path=last"]
    for epochs in (1, 2, 2):  # the last of which has nothing left to do
        main(["fit", *common, f"--trainer.max_epochs={epochs}"])
    run = tmp_path / "lightning_logs" / "mine"
    kept = {file.name: file.read_text() for file in run.glob("config*.yaml")}
    assert kept.keys() == {"config.yaml", "config-1.yaml"}
    assert "max_epochs: 1" in kept["config.yaml"]
    assert "max_epochs: 2" in kept["config-1.yaml"]
    steps = [row["step"] for row in read_metrics(run) if "train/reward" in row]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("callback", ["RolloutCheckpoint", "ModelCheckpoint"])
def test_what_was_not_trained_is_not_evaluated(base: str, tmp_path: Path, command: str, callback: str) -> None:
    file = config_file(base, tmp_path)
    if callback == "ModelCheckpoint":
        file.write_text(
            file.read_text()
            .replace("lightning_lambdapo.RolloutCheckpoint", "lightning.pytorch.callbacks.ModelCheckpoint")
            .replace("every_n_rollouts", "every_n_train_steps")
        )
    split = {"validate": "val"}.get(command, command)
    data = f"--data.{split}={{path: {tmp_path / 'rows.jsonl'}, limit: 4}}"
    more = ["--trainer.limit_val_batches=1.0"]
    with pytest.raises(CheckpointError, match="'last', and there is no last checkpoint, so the model would be an untr"):
        main([command, f"--config={file}", "--ckpt_path=last", data, *more])
    assert not list(tmp_path.rglob("results.json"))
    assert not list(tmp_path.rglob("predictions.jsonl"))


def test_training_says_that_it_starts_anew(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = config_file(base, tmp_path)
    with caplog.at_level("INFO"):
        main(["fit", f"--config={file}", "--ckpt_path=last"])
        assert caplog.text.count("no last checkpoint yet, so training starts anew, at step 1") == 1
        caplog.clear()
        main(["fit", f"--config={file}", "--ckpt_path=last", "--trainer.max_epochs=2"])
        assert "starts anew" not in caplog.text


def test_a_named_run_starts_anew_and_finds_no_other_runs(base: str, tmp_path: Path) -> None:
    file = config_file(base, tmp_path)
    for name in ("one", "two"):
        logger = (
            f"{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path}, version: {name}}}}}"
        )
        main(["fit", f"--config={file}", f"--trainer.logger={logger}", "--ckpt_path=last"])
        held = torch.load(tmp_path / "lightning_logs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        assert held["lambdapo"]["rollout_step"] == 4


def of_lightning(base: str, path: Path, settings: str | None) -> list[str]:
    """Options of a run that Lightning's own callback saves. Without settings it is the one that Lightning adds."""
    file = config_file(base, path)
    ours = "{class_path: lightning_lambdapo.RolloutCheckpoint, init_args: {every_n_rollouts: 4}}"
    theirs = f"{{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {{{settings}}}}}"
    text = file.read_text().replace(f"\n    - {ours}", " []" if settings is None else f"\n    - {theirs}")
    file.write_text(text.replace("limit_val_batches: 0", "limit_val_batches: 1.0"))
    rows = f"{{path: {path / 'rows.jsonl'}, limit: 4}}"
    return [f"--config={file}", f"--data.val={rows}", f"--data.test={rows}"]


def test_the_last_one_of_lightnings_own_callback_is_found(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In an earlier run, without a fixed directory."""
    common = [*of_lightning(base, tmp_path, "monitor: val/reward, mode: max, save_last: true"), "--ckpt_path=last"]
    first = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    with caplog.at_level("INFO"):
        main(["fit", *common])
        assert first.exists()
        assert caplog.text.count("so training starts anew, at step 1") == 1
        caplog.clear()
        main(["fit", *common, "--trainer.max_epochs=2"])
        assert f"Restored all states from the checkpoint at {first}" in caplog.text
        assert "starts anew" not in caplog.text
    second = find_checkpoint(tmp_path)
    assert second.parts[-3:] == ("version_1", "checkpoints", "last.ckpt")
    assert torch.load(second, weights_only=True)["lambdapo"]["rollout_step"] == 8
    main(["test", *common])
    (results,) = tmp_path.rglob("results.json")
    assert f'"checkpoint": "{second}"' in results.read_text()


@pytest.mark.parametrize("settings", [None, "monitor: val/reward, mode: max"], ids=["added", "given"])
def test_a_callback_that_saves_no_last_one_is_named(
    base: str, tmp_path: Path, settings: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    common = [*of_lightning(base, tmp_path, settings), "--ckpt_path=last"]
    with caplog.at_level("INFO"):
        main(["fit", *common])
    assert "This run saves none either: set `save_last: true` in its ModelCheckpoint." in caplog.text
    (saved,) = tmp_path.rglob("*.ckpt")
    with pytest.raises(
        CheckpointError, match="because ModelCheckpoint saves one only with `save_last: true`"
    ) as refused:
        main(["fit", *common, "--trainer.max_epochs=2"])
    assert str(saved) in str(refused.value)
    assert list(tmp_path.rglob("*.ckpt")) == [saved]
    with pytest.raises(CheckpointError, match="A last one is saved with `save_last: true`") as refused:
        main(["test", *common])
    assert str(saved) in str(refused.value)
    caplog.clear()
    saving = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true}}"
    with caplog.at_level("INFO"):
        main(["fit", *common, f"--trainer.callbacks=[{saving}]"])
    assert f"starts anew, at step 1. To resume from {saved}, give that file as `ckpt_path`." in caplog.text


def test_checkpoints_in_directories_of_their_own_are_found(base: str, tmp_path: Path) -> None:
    """A slash in a logged name makes a directory."""
    callback = RolloutCheckpoint(2, filename="{step}-{train/reward:.2f}", save_last=False, save_top_k=-1)
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, callbacks=[callback], enable_checkpointing=True, logger=logger)
    run.fit(module(base, lora=AdapterConfig(r=4)), Rows(batch_size=4))
    checkpoints = Path(logger.log_dir) / "checkpoints"
    assert find_checkpoint(tmp_path).parent == checkpoints / "step=4-train"
    assert {path.name for path in checkpoints.iterdir()} == {"step=2-train", "step=4-train"}
    main(["export", str(tmp_path)])
    assert (Path(logger.log_dir) / "export" / "adapter_model.safetensors").exists()
    assert "lambdapo export" in _files(Path(logger.log_dir)).plain


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_preempted_run_is_not_a_finished_one(base: str, tmp_path: Path, ranks: int) -> None:
    """SIGTERM after a step."""
    file = config_file(base, tmp_path)
    callback = "{class_path: lightning_lambdapo.RolloutCheckpoint, init_args: {every_n_rollouts: 1}}"
    arguments = ["fit", f"--config={file}", f"--trainer.callbacks=[{callback}]", "--trainer.max_epochs=1000"]
    arguments += ["--trainer.strategy=ddp", f"--trainer.devices={ranks}"] if ranks > 1 else []
    program: Any = subprocess.Popen(
        [sys.executable, "-m", "lightning_lambdapo", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    last = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    try:
        while not last.exists():
            assert program.poll() is None
            time.sleep(0.1)
        program.send_signal(signal.SIGTERM)
        output = program.communicate(timeout=90)[0].decode()
    finally:
        program.kill()
    assert program.returncode == 128 + signal.SIGTERM, output[-2000:]
    assert torch.load(last, weights_only=True)["lambdapo"]["rollout_step"] >= 1


def test_ranks_of_lightning_leave_the_exit_code_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun and SLURM start every rank, and see each one's code."""
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert not started_by_lightning()
    for rank, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert started_by_lightning() == expected
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert not started_by_lightning()
