"""A mistake in the settings is one sentence and exit code 2. Every other error has its traceback."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lambdapo import DataSource
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.commands.mistakes import is_about_settings, one_sentence
from lightning_lambdapo.rewards import Reward, RewardInputs


class Built(Reward):
    """A reward that a bug stops, when it is built or when it judges."""

    def __init__(self, early: bool = False) -> None:
        super().__init__(1.0, "built")
        if early:
            self.length = len(1)  # type: ignore[arg-type]

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        raise ValueError("a bug of the reward")


@pytest.fixture(autouse=True)
def _no_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMBDAPO_DEBUG", raising=False)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the program with a command line, as a shell does."""
    monkeypatch.setattr(sys, "argv", ["lambdapo", *arguments])
    main()


def callback(name: str, settings: str) -> str:
    """The option that makes a callback."""
    return f"--trainer.callbacks=[{{class_path: {name}, init_args: {{{settings}}}}}]"


#: Mistakes that only the callbacks' constructors find, and entries that are no class.
CALLBACKS = [
    (
        callback("lightning_lambdapo.RolloutCheckpoint", "every_n_rollouts: 0"),
        "`trainer.callbacks`: `every_n_rollouts` must be at least 1, got 0.",
    ),
    (
        callback("lightning_lambdapo.RolloutCheckpoint", "every_n_rollouts: 1, save_top_k: 2"),
        "`trainer.callbacks`: ModelCheckpoint(save_top_k=2, monitor=None) is not a valid configuration.",
    ),
    (
        callback("lightning_lambdapo.CompletionsLogger", "every_n_rollouts: 0"),
        "`trainer.callbacks`: `every_n_rollouts` must be at least 1, got 0.",
    ),
    (
        callback("lightning.pytorch.callbacks.ModelCheckpoint", "save_top_k: 2"),
        "`trainer.callbacks`: ModelCheckpoint(save_top_k=2, monitor=None) is not a valid configuration.",
    ),
    (
        callback("lightning.pytorch.callbacks.EarlyStopping", "monitor: val/reward, mode: foo"),
        "`trainer.callbacks`: `mode` can be min, max, got foo",
    ),
    ("--trainer.callbacks=[3]", "`trainer.callbacks` must be the path of a class or null, got '3'."),
]
ADAMW, SCHEDULERS = "{class_path: torch.optim.AdamW, init_args: {%s}}", "torch.optim.lr_scheduler"
#: Mistakes that only the first validation finds.
UNLOGGED = [
    (
        callback("lightning_lambdapo.RolloutCheckpoint", "every_n_rollouts: 1, monitor: val/rewrd"),
        "RolloutCheckpoint(monitor='val/rewrd') saved no best checkpoint, because validation does not log it. Logged ",
    ),
    (
        callback("lightning.pytorch.callbacks.EarlyStopping", "monitor: val/rewrd"),
        "Early stopping conditioned on metric `val/rewrd` which is not available.",
    ),
]
#: Mistakes that only torch finds, when it builds the optimizer or its schedule.
LEARNING = [
    (f"--model.optimizer={ADAMW % 'lr: -1.0e-4'}", "`optimizer` cannot be built: Invalid learning rate: -0.0001"),
    (f"--model.optimizer={ADAMW % 'lr: .nan'}", "`optimizer` cannot be built: Invalid learning rate: nan"),
    (
        f"--model.optimizer={ADAMW % 'betas: [0.9, 1.5]'}",
        "`optimizer` cannot be built: Invalid beta parameter at index",
    ),
    (
        f"--model.lr_scheduler={{class_path: {SCHEDULERS}.LinearLR, init_args: {{start_factor: 0}}}}",
        "`lr_scheduler` cannot be built: Starting multiplicative factor expected to be greater than 0",
    ),
    (
        f"--model.lr_scheduler={{class_path: {SCHEDULERS}.OneCycleLR, init_args: {{max_lr: 0.1, total_steps: -1}}}}",
        "`lr_scheduler` cannot be built: Expected positive integer total_steps, but got -1",
    ),
    (
        callback("lightning.pytorch.callbacks.GradientAccumulationScheduler", "scheduling: {0: 2}"),
        "GradientAccumulationScheduler has no effect under manual optimisation. Remove it. For larger updates raise",
    ),
]
SENTENCES: list[tuple[str | list[str], str]] = [
    (
        "--model.rollout.group_size=1",
        "`group_size` must be at least 2, got 1, because a pairwise advantage needs a peer.",
    ),
    ("--model.rollout.group_size=few", "`model.rollout.group_size` must be a whole number, got 'few'."),
    ("--model.rollout.groupsize=4", "There is no setting `model.rollout.groupsize`."),
    ("--model.rollout={groupsize: 4}", "There is no setting `model.rollout.groupsize`."),
    ("--data.train.limit=some", "`data.train.limit` must be a whole number or null, got 'some'."),
    (
        "--model.policy.quantization=nf5",
        "`model.policy.quantization` must be one of 'nf4', 'fp4', 'int8' or null, got 'nf5'.",
    ),
    ("--model.lora.r=big", "`model.lora.r` must be a whole number, got 'big'."),
    (
        "--model.rewards=[lightning_lambdapo.Nope]",
        "`model.rewards`: module 'lightning_lambdapo' has no attribute 'Nope'",
    ),
    ("--trainer.max_steps=few", "`trainer.max_steps` must be a whole number, got 'few'."),
    ("--model.optimizer.lr=fast", "`model.optimizer` needs a class_path before its `lr` can be set."),
    (
        "--model.optimizer={init_args: {lr: 0.1}}",
        "`model.optimizer` needs a class_path before its `lr` can be set.",
    ),
    ("--data.train.preset=gsm8", "Unknown preset 'gsm8'. There are arithmetic, gsm8k,"),
    ("--trainer.gradient_clip_val=1", "Trainer(gradient_clip_val=1) has no effect under manual optimisation, so set"),
    ("--trainer.strategy=sideways", "You selected an invalid strategy name: `strategy='sideways'`."),
    ("--model.updates_per_rollout=64", "`updates_per_rollout` / `epochs_per_rollout` asks for 64 mini-batches"),
    (
        "--model.rollout={engine: vllm_server, servers: {urls: ['http://127.0.0.1:9'], deadline: 0.1}}",
        "http://127.0.0.1:9 does not answer within `rollout.servers.deadline` (0.1 s). Start it with: VLLM_SERVER_DEV_",
    ),
    *CALLBACKS,
    *LEARNING,
    *UNLOGGED,
    (
        ["--model.rewards=[lightning_lambdapo.rewards.AccuracyReward,small.Digits]", "--model.rewards.1.wieght=0"],
        "There is no setting `model.rewards.1.wieght`.",
    ),
    (
        "--model.rewards=[{weight: 0.5}]",
        "`model.rewards` needs a class_path, because Reward is abstract. For a plain function with a weight: {class_",
    ),
    (f"--seed_everything={2**70}", f"`seed_everything` must be at most 4294967295, got {2**70}."),
    ("--seed_everything=-1", "`seed_everything` must be at least 0, got -1."),
    ("--model.policy.model=nobody/nothing", "`policy.model` is 'nobody/nothing': We couldn't connect to"),
    ("--model.policy.tokenizer=nobody/nothing", "`policy.tokenizer` is 'nobody/nothing': We couldn't connect to"),
    ("--nothing=3", "unrecognized arguments: --nothing=3"),
    ("--config=nothing.yaml", "`config`: File does not exist: "),
]


@pytest.mark.parametrize(("argument", "sentence"), SENTENCES)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    argument: str | list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [argument] if isinstance(argument, str) else argument
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "fit", *arguments, "--trainer.max_epochs=1", *more)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    error, help_line = told[told.index("lambdapo fit: error: ") :].strip().splitlines()
    assert error.startswith(f"lambdapo fit: error: {sentence}")
    assert "--help" in help_line or "--debug" in help_line
    assert "Traceback" not in told
    assert "usage:" not in told
    assert "NestedArg" not in told


#: Mistakes, how the sentence about each ends, and the option whose help has the settings beside it.
REWARDS = "lightning_lambdapo.rewards"
HELPED: list[tuple[list[str], str, str]] = [
    (["--model.rollout.groupsize=4"], "Did you mean `model.rollout.group_size`?", "--model.help"),
    (["--model.rollout={groupsize: 4}"], "Did you mean `model.rollout.group_size`?", "--model.help"),
    (["--model.group_size=4"], "Did you mean `model.rollout.group_size`?", "--model.help"),
    (["--model.rolout.group_size=4"], "Did you mean `model.rollout.group_size`?", "--model.help"),
    (
        ["--model.sampling.top_pp=1"],
        "`model.rollout.sampling.top_p` or `model.validation.sampling.top_p`?",
        "--model.help",
    ),
    (["--model.rollout.num_generations=4"], "no setting `model.rollout.num_generations`.", "--model.help"),
    (["--model.rollout.group_size=few"], "must be a whole number, got 'few'.", "--model.help"),
    (
        ["--data.batchsize=4"],
        "Did you mean `data.batch_size`?",
        "--data.help=lightning_lambdapo.LambdaPODataModule",
    ),
    (["--model.lora.alpa=4"], "Did you mean `model.lora.alpha`?", "--model.lora.help=lightning_lambdapo.AdapterConfig"),
    (
        [f"--model.rewards=[{REWARDS}.AccuracyReward,{REWARDS}.FormatReward]", "--model.rewards.1.wieght=0"],
        "Did you mean `model.rewards.1.weight`?",
        f"--model.rewards.help={REWARDS}.FormatReward",
    ),
    (
        [f"--model.rewards=[{REWARDS}.LengthPenalty]"],
        "`model.rewards.max_length` and `model.rewards.buffer` are required.",
        f"--model.rewards.help={REWARDS}.LengthPenalty",
    ),
    (
        [f"--model.lr_scheduler={SCHEDULERS}.CosineAnnealingLR"],
        "error: `model.lr_scheduler.T_max` is required.",
        f"--model.lr_scheduler.help={SCHEDULERS}.CosineAnnealingLR",
    ),
    (
        ["--model.rewards=[named_rewards.brief]", "--model.rewards.0.wieght=0"],
        "Did you mean `model.rewards.0.weight`?",
        f"--model.rewards.help={REWARDS}.FunctionReward",
    ),
    (["--trainer.mx_stepss=4"], "--trainer.mx_stepss=4. Did you mean `trainer.max_steps`?", "--help"),
]


@pytest.mark.parametrize(("more", "end", "option"), HELPED)
def test_the_help_that_is_named_has_the_settings(
    arguments: list[str],
    more: list[str],
    end: str,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "fit", *arguments, *more)
    told = capsys.readouterr().err
    error, help_line = told[told.index("lambdapo fit: error: ") :].strip().splitlines()
    assert error.endswith(end)
    if option == "--help":
        assert help_line == "All settings: lambdapo fit --help"
    else:
        place = option.partition(".help")[0].removeprefix("--")
        assert help_line == f"All settings of `{place}`: lambdapo fit {option} (others: lambdapo fit --help)"
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "fit", option)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    key = re.findall(r"`([\w.]+)`", error)[-1].replace(".1.", ".").replace(".0.", ".").split(".")
    if "no setting" not in end:
        assert any(f"--{'.'.join(key[start:])} " in shown for start in range(len(key) - 1))


def test_settings_without_a_help_of_their_own_are_listed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "fit", *arguments, "--data.train.presett=x")
    told = capsys.readouterr().err
    assert "no setting `data.train.presett`. Did you mean `data.train.preset`?\nAll settings of `data.train`: " in told
    listed = told.partition("`data.train`: ")[2].removesuffix(" (others: lambdapo fit --help)\n")
    assert listed.split(", ") == [each.name for each in dataclasses.fields(DataSource)]


def test_a_setting_of_the_trainer_in_a_file(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {max_step: 3}")
    with pytest.raises(SystemExit):
        call(monkeypatch, "fit", f"--config={tmp_path / 'config.yaml'}", *arguments)
    told = capsys.readouterr().err
    assert "lambdapo fit: error: There is no setting `trainer.max_step`. Did you mean `trainer.max_steps`?" in told


@pytest.mark.parametrize("asked", ["--debug", "LAMBDAPO_DEBUG"])
def test_the_traceback_is_there_for_the_asking(
    arguments: list[str], asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [asked] if asked.startswith("-") else []
    if not more:
        monkeypatch.setenv(asked, "1")
    with pytest.raises(ValueError, match="a pairwise advantage needs a peer"):
        call(monkeypatch, "fit", *arguments, "--model.rollout.group_size=1", *more)
    with pytest.raises(SystemExit):
        call(monkeypatch, "fit", *arguments, "--model.rollout.group_size=few", *more)
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "Expected a <class 'int'>. Got value: few" in told


def test_a_bug_keeps_its_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = f"--model.rewards=[{{class_path: {__name__}.Built}}]"
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Built.__module__])
    with pytest.raises(RuntimeError, match="built"):
        call(monkeypatch, "fit", *arguments, reward, "--trainer.limit_val_batches=0", "--trainer.max_steps=1")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("lightning_lambdapo.module.LambdaPOModule.training_step", full)
    with pytest.raises(torch.OutOfMemoryError):
        call(monkeypatch, "fit", *arguments, "--trainer.limit_val_batches=0", "--trainer.max_steps=1")
    assert "error: " not in capsys.readouterr().err


def test_from_python_errors_are_raised(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="a pairwise advantage needs a peer"):
        main(["fit", *arguments, "--model.rollout.group_size=1"])


def raised(action: Any) -> BaseException:
    """The error of an action."""
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_what_is_about_settings(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    from lightning_lambdapo import EvaluationConfig, RolloutConfig
    from lightning_lambdapo.data.sources import jsonl_rows
    from lightning_lambdapo.functional.masking import check_choice

    def training_step() -> None:
        RolloutConfig(group_size=1)

    def own() -> None:
        raise ValueError("not of this package")

    assert is_about_settings(raised(lambda: RolloutConfig(group_size=1)))
    assert is_about_settings(raised(lambda: check_choice("name", "x", ("y",))))
    assert is_about_settings(raised(lambda: next(jsonl_rows(str(tmp_path / "no.jsonl")))))
    assert is_about_settings(raised(lambda: Trainer(accelerator="cpu", fast_dev_run=-1, logger=False)))
    assert is_about_settings(raised(lambda: DataSource(preset="none")))
    assert not is_about_settings(raised(training_step)), "while batches are computed"
    assert not is_about_settings(raised(own))
    assert not is_about_settings(raised(lambda: torch.zeros(2) @ torch.zeros(3)))
    assert not is_about_settings(raised(lambda: EvaluationConfig(k=3))), "no `raise` of this package"  # type: ignore[arg-type]


def test_a_message_without_alternatives_stays() -> None:
    assert one_sentence("All is lost.\n  Really.") == "All is lost.\n  Really."
    nested = (
        'Parser key "a":\n  Problem with given class_path \'x.Y\':\n    Parser key "b":\n      One line.\n      Two.'
    )
    assert one_sentence(nested) == "`a.b`: One line.\nTwo."
