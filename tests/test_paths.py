"""``~`` is the home directory in every path, and paths may be ``Path`` objects."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from small import ROWS, Digits, Rows, module, trainer

from lightning_lambdapo import (
    CompletionsLogger,
    DataSource,
    LambdaPODataModule,
    LambdaPOModule,
    PolicyConfig,
    PolicyExport,
    RolloutCheckpoint,
)
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.data.sources import load_rows
from lightning_lambdapo.rewards import SemanticDensityReward


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory; the working directory is another one and stays empty."""
    place, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("USERPROFILE", str(place))
    monkeypatch.chdir(elsewhere)
    return place


def test_all_paths_of_a_command_line(base: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base, home / "base")
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings: dict[str, Any] = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": "~/runs",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning_lambdapo.RolloutCheckpoint", "init_args": {"every_n_rollouts": 1}},
                {"class_path": "lightning_lambdapo.CompletionsLogger"},
            ],
        },
        "model": {"policy": {"model": "~/base"}, "rollout": {"group_size": 2, "max_new_tokens": 5}},
        "data": {"train": {"path": "~/rows.jsonl"}, "test": {"path": "~/rows.jsonl"}, "batch_size": 4},
    }
    (home / "settings.yaml").write_text(yaml.safe_dump(settings))
    limits = ["--trainer.max_steps=1", "--trainer.max_epochs=1", "--trainer.limit_val_batches=0"]
    main(["fit", "--config=~/settings.yaml", *limits])
    run = home / "runs" / "lightning_logs" / "version_0"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "completions.jsonl").is_file()
    assert (run / "metrics.csv").is_file()
    last = "~/runs/lightning_logs/version_0/checkpoints/last.ckpt"
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: ~/logs}}"
    evaluated = ["--config=~/settings.yaml", f"--ckpt_path={last}"]
    main(["test", *evaluated, f"--trainer.logger={logger}"])
    assert (home / "logs" / "lightning_logs" / "version_0" / "results.json").is_file()
    main(["predict", *evaluated])
    assert (home / "runs" / "lightning_logs" / "version_1" / "predictions.jsonl").is_file()
    main(["export", "~/runs/lightning_logs/version_0", "--output=~/exported", "--config=~/settings.yaml"])
    assert (home / "exported" / "model.safetensors").is_file()
    main(["score", "~/runs/lightning_logs/version_1/predictions.jsonl", "--output=~/scored"])
    assert (home / "scored" / "predictions.results.json").is_file()
    main(["inspect-rollout", "~/runs/lightning_logs/version_0"])
    assert LambdaPOModule.load_from_checkpoint(last).policy_config.model == str(home / "base")
    assert not list(Path.cwd().iterdir()), "nothing is written to a directory that is called ~"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_all_paths_of_a_script(base: str, home: Path) -> None:
    callbacks = [RolloutCheckpoint(every_n_rollouts=1), CompletionsLogger(), PolicyExport("~/exported")]
    settings: dict[str, Any] = {"callbacks": callbacks, "enable_checkpointing": True, "max_steps": 1}
    run = trainer(Path("~/root"), logger=CSVLogger("~/logs"), **settings)
    run.fit(module(base), Rows(batch_size=4))
    made = home / "logs" / "lightning_logs" / "version_0"
    assert (made / "checkpoints" / "last.ckpt").is_file()
    assert (made / "completions.jsonl").is_file()
    assert (home / "exported" / "config.json").is_file()
    again = trainer(Path("~/root"), max_steps=2)
    again.fit(module(base), Rows(batch_size=4), ckpt_path="~/logs/lightning_logs/version_0/checkpoints/last.ckpt")
    assert again.global_step == 2
    assert not list(Path.cwd().iterdir())


def test_path_objects(base: str, home: Path, tmp_path: Path) -> None:
    policy = PolicyConfig(Path(base), tokenizer=Path(base), adapter=Path("~/adapter"))  # type: ignore[arg-type]
    assert (policy.model, policy.tokenizer, policy.adapter) == (base, base, str(home / "adapter"))
    assert (PolicyConfig("~/x").model, PolicyConfig("org/x").model) == (str(home / "x"), "org/x")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = DataSource(path=rows)  # type: ignore[arg-type]
    assert len(load_rows(source)) == len(ROWS)
    assert DataSource(dataset=Path("~/set")).dataset == str(home / "set")  # type: ignore[arg-type]
    density = SemanticDensityReward(kind="embedding", encoder=Path("~/encoder"))  # type: ignore[arg-type]
    assert density.encoder == str(home / "encoder")
    model = LambdaPOModule(PolicyConfig(Path(base)), rewards=[Digits()])  # type: ignore[arg-type]
    callback = RolloutCheckpoint(every_n_rollouts=1, dirpath=Path("~/saved"))
    settings: dict[str, Any] = {"callbacks": [callback], "enable_checkpointing": True, "max_steps": 1}
    trainer(tmp_path, **settings).fit(model, LambdaPODataModule(train=source, batch_size=4))
    held = LambdaPOModule.load_from_checkpoint(Path("~/saved/last.ckpt"), rewards=[Digits()])
    assert held.policy_config.model == base


@pytest.mark.parametrize("name", ["model", "tokenizer", "adapter"])
def test_a_directory_that_is_not_there(base: str, home: Path, name: str) -> None:
    settings: dict[str, Any] = {"model": base, name: "~/nowhere"}
    message = rf"`policy.{name}` is the directory .*nowhere, which does not exist"
    with pytest.raises(ValueError, match=message):
        LambdaPOModule(PolicyConfig(**settings))
