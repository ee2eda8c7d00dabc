"""Every way in which release 0.1's switches may be given, down to the module that is built."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer

from lightning_lambdapo import LambdaPOModule
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.commands.release_0_1 import upgraded_arguments
from lightning_lambdapo.config import PerformanceConfig

BASE = [
    "--seed_everything=1",
    "--model.policy.model=builtin:arithmetic",
    "--data.train.preset=arithmetic",
    "--trainer.max_steps=1",
]
WANTED = PerformanceConfig(compaction=False)


def built(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> PerformanceConfig:
    """The switches of the module that a command line trains."""
    seen: list[PerformanceConfig] = []

    def fit(self: Trainer, model: LambdaPOModule, **_: object) -> None:
        seen.append(model.performance)

    monkeypatch.setattr(Trainer, "fit", fit)
    main(arguments)
    return seen[0]


FILES = {
    "roll.yaml": {"compaction": False, "group_size": 4},
    "model.yaml": {"rollout": {"compaction": False}},
    "names.yaml": {"model": {"init_args": {"rollout": "roll.yaml"}}},
    "model_name.yaml": {"model": "model.yaml"},
    "all.yaml": {"fit": {"model": {"rollout": {"compaction": False}}}},
    "plain.yaml": {"model": {"init_args": {"rollout": {"compaction": False}}}},
}


@pytest.mark.parametrize(
    "given",
    [
        ["--model.rollout.compaction=false"],
        ["--model.rollout.compaction", "false"],
        ["--model.init_args.rollout.compaction=false"],
        ["--model.rollout={compaction: false}"],
        ["--model.rollout", "{compaction: false, group_size: 4}"],
        ["--model.init_args={rollout: {compaction: false}}"],
        ["--model={class_path: lightning_lambdapo.LambdaPOModule, init_args: {rollout: {compaction: false}}}"],
        ["--model.rollout=roll.yaml"],
        ["--model=model.yaml"],
        ["--config=plain.yaml"],
        ["--config", "names.yaml"],
        ["-c", "model_name.yaml"],
        ["--config={model: {rollout: {compaction: false}}}"],
    ],
    ids=" ".join,
)
def test_switches_of_0_1_reach_the_module(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    assert built(["fit", *given, *BASE], monkeypatch) == WANTED


def test_a_configuration_of_all_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(FILES["all.yaml"]))
    assert built(["--config", "all.yaml", "fit", *BASE], monkeypatch) == WANTED


@pytest.mark.parametrize(
    "given",
    [
        ["fit", "--model.rollout={group_size: 4}", "--trainer.max_steps", "3"],
        ["fit", "--model.policy.model=x", "--model.rewards+=a.b", "--data.train={path: x.jsonl}"],
        ["fit", "--model.performance.compaction=false", "--print_config"],
        ["fit", "--config=missing.yaml", "--ckpt_path=last"],
        ["fit", "--model.rollout={broken", "--model"],
        ["fit", "--help"],
        ["fit", "--model.help", "LambdaPOModule"],
    ],
    ids=" ".join,
)
def test_everything_else_is_left_as_it_is(given: list[str]) -> None:
    assert upgraded_arguments(given) == given
