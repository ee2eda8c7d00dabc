"""What a run says in the terminal and in log files, and where its tables of completions go."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import rich
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.text import Text
from small import Rows, adamw, json_lines, module, trainer

from lightning_lambdapo import CompletionsLogger, RolloutCheckpoint
from lightning_lambdapo.callbacks.console import TrainingConsole
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.runs.tables import markdown_group


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern} in\n{text}"
    return float(found[1].replace(",", ""))


class Curves(Callback):
    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.tokens = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rewards.append(float(trainer.callback_metrics["train/reward"]))
        self.tokens += int(outputs["rollout"].lengths.sum())


def fit(path: Path, base: str, **settings: Any) -> Curves:
    curves = Curves()
    callbacks = [TrainingConsole(every_n_rollouts=2), curves, *settings.pop("callbacks", [])]
    defaults: dict[str, Any] = {"enable_progress_bar": True, "limit_val_batches": 1.0, "callbacks": callbacks}
    model = settings.pop("model", None) or module(base)
    trainer(path, **(defaults | settings)).fit(model, Rows(batch_size=4))
    return curves


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns in the place of rich's console."""
    screen = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=screen, force_terminal=True, width=80, color_system=None))
    return screen


def test_lines_where_there_is_no_terminal(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = fit(tmp_path, base)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/4", "2/4", "4/4"]
    for line, step in zip(steps, (1, 2, 4), strict=True):
        assert number(r"reward ([\d.]+)", line) == pytest.approx(curves.rewards[step - 1], abs=5e-4)
        assert re.search(r"dens [\d.]+  ent [\d.]+  len [\d.]+  [\d.]+k? tok/s", line)
        assert line.endswith(" left") == (step < 4)
        assert len(line) <= 100
    assert any(re.match(r"val at step 4  reward [\d.]+", line) for line in lines)
    assert "\x1b" not in "".join(lines)


def test_the_summary(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = CSVLogger(tmp_path)
    extra = [CompletionsLogger(), RolloutCheckpoint(every_n_rollouts=4)]
    curves = fit(tmp_path, base, logger=logger, callbacks=extra, enable_checkpointing=True, max_epochs=5)
    text = capsys.readouterr().out
    assert number(r"(\d+) steps in \d", text) == 20
    assert number(r"([\d,]+) tokens sampled", text) == curves.tokens
    row = next(line for line in text.splitlines() if line.startswith("reward "))
    first, last = sum(curves.rewards[:2]) / 2, sum(curves.rewards[-2:]) / 2
    expected = [first, last, last - first]
    assert [float(value) for value in row.split()[1:]] == pytest.approx(expected, abs=6e-4)
    assert "first 2 steps" in text
    assert re.search(r"val reward \(step 4, 20\)", text)
    run = f"{tmp_path}/lightning_logs/version_0"
    assert f"files    {run}: checkpoints/, completions.jsonl, hparams.yaml, metrics.csv\n" in text
    assert f"lambdapo inspect-rollout {run}" in text
    assert f"lambdapo export {run}" in text


@pytest.mark.parametrize("checkpoints", [True, False])
def test_files_of_others_are_not_the_runs(
    arguments: list[str],
    checkpoints: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a logger a run writes where it was started."""
    for name in ("thesis.tex", "config.yaml"):
        (tmp_path / name).write_text("a: 1")
    for name in ("photos", "checkpoints"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    plain = [each for each in arguments if "enable_progress_bar" not in each]
    more = ["--trainer.logger=false", f"--trainer.enable_checkpointing={str(checkpoints).lower()}"]
    main(["fit", *plain, *more, "--trainer.max_steps=2", "--trainer.max_epochs=1"])
    text = capsys.readouterr().out
    kept = "checkpoints/, " if checkpoints else ""
    assert f"files    .: {kept}completions.jsonl, config-1.yaml\n" in text
    assert ("lambdapo export ." in text) == checkpoints
    assert "lambdapo inspect-rollout ." in text


def test_a_run_that_writes_nothing_names_no_files(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    fit(tmp_path, base)
    text = capsys.readouterr().out
    assert "4 steps in" in text
    assert "files" not in text


def test_the_bar_in_a_terminal(base: str, tmp_path: Path, terminal: io.StringIO) -> None:
    fit(tmp_path, base, num_sanity_val_steps=1)
    text = Text.from_ansi(terminal.getvalue()).plain
    assert "train" in text
    assert "4/4" in text
    assert re.search(r"reward [\d.]+  dens [\d.]+  ent [\d.]+  len [\d.]+  [\d.]+k? tok/s", text)
    assert "val at step 4" in text
    assert "check" in text
    assert "step 1/4" not in text
    assert all(len(line) <= 80 for line in text.splitlines() if "tok/s" in line)


def test_steps_are_counted_to_the_end_of_the_run(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``max_steps`` counts updates; here a step makes three of them."""
    model = module(base, updates_per_rollout=3, epochs_per_rollout=3, optimizer=adamw)
    fit(tmp_path, base, model=model, max_epochs=-1, max_steps=18)
    assert "step 6/6" in capsys.readouterr().out
    fit(tmp_path, base, max_epochs=2)
    assert "step 8/8" in capsys.readouterr().out
    fit(tmp_path, base, max_epochs=2, max_steps=3)
    assert "step 3/3" in capsys.readouterr().out


def test_other_ranks_are_silent(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class OtherRank(TrainingConsole):
        def enable(self) -> None:
            self.disable()

        def setup(self, *args: Any, **kwargs: Any) -> None:
            super().setup(*args, **kwargs)
            self.disable()

    callbacks: list[Callback] = [OtherRank()]
    trainer(tmp_path, enable_progress_bar=True, callbacks=callbacks).fit(module(base), Rows(batch_size=4))
    assert not capsys.readouterr().out


def test_an_error_leaves_the_terminal_alone(base: str, tmp_path: Path, terminal: io.StringIO) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("mine")

    console = TrainingConsole()
    run = trainer(tmp_path, enable_progress_bar=True, callbacks=[console, Fails()])
    with pytest.raises(RuntimeError, match="mine"):
        run.fit(module(base), Rows(batch_size=4))
    assert console._bars is None
    assert "steps in" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ([], True),
        (["--trainer.enable_progress_bar=false"], False),
        (["--trainer.callbacks+=lightning.pytorch.callbacks.RichProgressBar"], False),
    ],
    ids=["default", "off", "own"],
)
def test_the_command_line_adds_it(
    arguments: list[str],
    more: list[str],
    shown: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = [argument for argument in arguments if "enable_progress_bar" not in argument]
    main(["fit", *plain, *more, "--trainer.max_steps=2", "--trainer.max_epochs=1"])
    text = capsys.readouterr().out
    assert ("2 steps in " in text) == shown
    assert ("lambdapo inspect-rollout" in text) == shown


def test_a_bad_setting() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TrainingConsole(every_n_rollouts=0)


def telling(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first group of four whose rewards are not all the same."""
    groups = [records[start : start + 4] for start in range(0, len(records), 4)]
    return next(group for group in groups if any(record["total"] != group[0]["total"] for record in group))


def test_tables_reach_tensorboard(base: str, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, base, callbacks=[CompletionsLogger(table_every_n_rollouts=2)], logger=logger)
    events = reader.EventAccumulator(logger.log_dir)
    events.Reload()
    found = events.Tensors("completions/text_summary")
    scalars = {event.step: event.value for event in events.Scalars("train/reward")}
    assert [event.step for event in found] == [1, 3]  # as the values of steps 2 and 4 are
    assert sorted(scalars) == [0, 1, 2, 3]
    records = json_lines(Path(logger.log_dir) / "completions.jsonl")
    for event, step in zip(found, (2, 4), strict=True):
        group = telling([record for record in records if record["step"] == step])
        text = event.tensor_proto.string_val[0].decode()
        assert text == markdown_group(group)
        assert len(re.findall(r"^\| \d \|", text, re.MULTILINE)) == 4


@pytest.mark.timeout(120)
def test_tables_reach_wandb(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    import wandb

    logger = WandbLogger(save_dir=str(tmp_path), project="tables", offline=True)
    try:
        fit(tmp_path, base, callbacks=[CompletionsLogger(table_every_n_rollouts=4)], logger=logger)
    finally:
        wandb.finish()
        wandb.teardown()
    (table,) = tmp_path.rglob("completions_*.table.json")
    found = json.loads(table.read_text())
    assert found["columns"][:5] == ["prompt_id", "sample", "prompt", "completion", "digits"]
    assert len(found["data"]) == 4
    (file,) = tmp_path.rglob("completions.jsonl")
    last = telling([record for record in json_lines(file) if record["step"] == 4])
    assert [row[3] for row in found["data"]] == [record["completion"] for record in last]
