"""What release 0.1 wrote still loads: configurations, checkpoints, command lines, import paths.

``golden/release_0_1`` was written by release 0.1: ``run.ckpt`` after two of the four steps of ``config.yaml``, whose
``completions.jsonl`` and ``metrics.csv`` are those of the whole run; ``python.ckpt`` by a module built in Python.
"""

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from small import Rows, module, trainer
from torch import nn

from lightning_lambdapo import LambdaPOModule, PolicyConfig
from lightning_lambdapo.callbacks import EvaluationReport, TrainingConsole
from lightning_lambdapo.checkpointing.release_0_1 import MOVED_SETTINGS
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.commands.release_0_1 import upgraded_arguments, upgraded_config
from lightning_lambdapo.config import PerformanceConfig, RolloutConfig

RECORDED = Path(__file__).parent / "golden" / "release_0_1"

#: Everything that could be imported from these modules in release 0.1.
PUBLIC = {
    "lightning_lambdapo": "AdapterConfig AlgorithmConfig CompletionsLogger DataSource EvaluationConfig "
    "EvaluationReport "
    "LambdaPODataModule LambdaPOModule PolicyConfig PolicyExport PromptBatch PromptCollator PromptTemplate RewardPlot "
    "RolloutCheckpoint RolloutConfig SamplingConfig Throughput TrainingConsole",
    "lightning_lambdapo.rewards": "AccuracyReward FormatReward FunctionReward LengthPenalty MathVerifier Reward "
    "RewardInputs SemanticDensityReward Verdict as_rewards score",
    "lightning_lambdapo.rollout": "GroupedEngine HFEngine RolloutConfig RolloutEngine SamplingConfig",
    "lightning_lambdapo.data": "PRESETS DataSource LambdaPODataModule PromptCollator PromptLoader PromptSampler "
    "PromptTemplate load_rows",
    "lightning_lambdapo.functional": "EmbeddingDensityScore LossOutput SemanticDensityScore chunked_logprobs "
    "completion_mask embedding_density group_advantages lambda_advantages logprobs_from_logits masked_mean masked_sum "
    "pairwise_weights policy_loss reasoning_trace semantic_density sequence_scores tokenize",
    "lightning_lambdapo.datatypes": "LossOutput PromptBatch Rollout Scores",
    "lightning_lambdapo.rewards.verifier": "MathVerifier Verdict",
    "lightning_lambdapo.callbacks": "CompletionsLogger PolicyExport RewardPlot RolloutCheckpoint Throughput "
    "finished_rollouts run_directory",
    "lightning_lambdapo.metrics": "GroupDiagnostics MajorityAtK PassAtK SemanticDensity",
    "lightning_lambdapo.policy": "AdapterConfig PolicyConfig causal_lm eos_token_ids load_policy load_tokenizer "
    "save_policy",
    "lightning_lambdapo.config": "AlgorithmConfig EvaluationConfig",
    "lightning_lambdapo.cli": "LambdaPOCLI main",
    "lightning_lambdapo.console": "TrainingConsole",
    "lightning_lambdapo.reports": "EvaluationReport",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_they_were(module: str) -> None:
    found = importlib.import_module(module)
    for name in PUBLIC[module].split():
        assert getattr(found, name) is not None
    with pytest.raises(AttributeError):
        found.nothing_of_this_name  # noqa: B018


def test_moved_modules_give_the_very_classes() -> None:
    assert importlib.import_module("lightning_lambdapo.console").TrainingConsole is TrainingConsole
    assert importlib.import_module("lightning_lambdapo.reports").EvaluationReport is EvaluationReport
    assert importlib.import_module("lightning_lambdapo.cli").main is main


def rows(file: Path) -> list[dict[str, float]]:
    with file.open(newline="") as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


def completions(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_of_0_1_is_resumed_to_the_end_it_had(tmp_path: Path) -> None:
    """From its own config.yaml, callbacks and all: the third and fourth step are those of the uninterrupted run."""
    main(
        [
            "fit",
            f"--config={RECORDED / 'config.yaml'}",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.max_steps=4",
            f"--ckpt_path={RECORDED / 'run.ckpt'}",
        ]
    )
    run = tmp_path / "lightning_logs" / "version_0"
    expected = [record for record in completions(RECORDED / "completions.jsonl") if record["step"] > 2]
    found = completions(run / "completions.jsonl")
    for ours, theirs in zip(found, expected, strict=True):
        assert {**ours, "score": 0, "advantage": 0} == {**theirs, "score": 0, "advantage": 0}
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours["advantage"] == pytest.approx(theirs["advantage"], abs=1e-4)
    # The checkpoint was saved before the validation after the second step, which is repeated.
    recorded = rows(RECORDED / "metrics.csv")
    wanted = [row for row in recorded if row["step"] > 1 or (row["step"] == 1 and "val/reward" in row)]
    logged = rows(run / "metrics.csv")
    assert len(logged) == len(wanted) == 4
    for now, then in zip(logged, wanted, strict=True):
        assert now.keys() >= then.keys()
        for name, value in then.items():
            if not name.startswith(("train/step_seconds", "train/tokens_per_second")) and "drift" not in name:
                assert now[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert config["performance"]["compaction"] is config["performance"]["share_prompts_in_learning"] is False
    assert "compaction" not in config["rollout"]
    assert "share_prompts" not in config


def test_a_resumed_run_keeps_its_generation_of_streams(tmp_path: Path) -> None:
    """0.1 names none in its checkpoints. A run that is resumed twice, or validated, is still one of 0.1."""
    new = LambdaPOModule(PolicyConfig("builtin:arithmetic"))
    assert new.run_state.streams == 2
    arguments = [f"--config={RECORDED / 'config.yaml'}", "--trainer.limit_val_batches=0"]
    source, kept = RECORDED / "run.ckpt", []
    for name, steps in (("first", 4), ("second", 6)):
        main(
            [
                *("fit", *arguments, f"--ckpt_path={source}", f"--trainer.default_root_dir={tmp_path / name}"),
                *(f"--trainer.max_steps={steps}", "--trainer.max_epochs=10"),
            ]
        )
        source = next((tmp_path / name).rglob("*.ckpt"))
        held = torch.load(source, weights_only=True)
        (loader,) = held["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        kept.append((held["lambdapo"]["rollout_step"], held["lambdapo"]["streams"], loader["streams"]))
    assert kept == [(4, 1, 1), (6, 1, 1)]
    assert LambdaPOModule.load_from_checkpoint(source).run_state.streams == 1


@pytest.mark.parametrize(
    ("name", "performance"),
    [
        (
            "run",
            PerformanceConfig(
                share_prompts_in_rollouts=False,
                compaction=False,
                merge_adapter=False,
                share_prompts_in_learning=False,
            ),
        ),
        ("python", PerformanceConfig(compaction=False, recompute_logits=True, fused_lora=False)),
    ],
)
def test_checkpoints_of_0_1_load_with_their_switches(name: str, performance: PerformanceConfig) -> None:
    file = RECORDED / f"{name}.ckpt"
    loaded = LambdaPOModule.load_from_checkpoint(file)
    assert loaded.performance == performance
    assert loaded.policy_config == PolicyConfig("builtin:arithmetic")
    assert loaded.rollout_config.max_new_tokens == {"run": 24, "python": 6}[name]
    held = torch.load(file, weights_only=True)
    parameters = dict(loaded.named_parameters())
    assert held["state_dict"]
    for key, value in held["state_dict"].items():
        assert torch.equal(parameters[key], nn.Parameter(value))
    assert loaded.rollout_step == held["lambdapo"]["rollout_step"] > 0


def test_a_checkpoint_of_0_1_is_exported(tmp_path: Path) -> None:
    main(["export", str(RECORDED / "run.ckpt"), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "24 tokens" in (tmp_path / "out" / "README.md").read_text()


class Keywords(LambdaPOModule):
    """Passes on whatever it is given, as many subclasses do."""

    def __init__(self, extra: int = 1, **keywords: Any) -> None:
        super().__init__(**keywords)


def test_a_checkpoint_of_0_1_loads_into_a_subclass_with_keywords() -> None:
    assert not Keywords.load_from_checkpoint(RECORDED / "python.ckpt").performance.compaction


def test_settings_of_0_1_may_be_given_while_loading() -> None:
    policy = {"model": "builtin:arithmetic", "onednn": False}
    loaded = LambdaPOModule.load_from_checkpoint(RECORDED / "python.ckpt", policy=policy)
    assert loaded.performance.onednn is False


def test_a_step_still_returns_the_names_of_0_1(base: str, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Reader(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append(outputs)

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append(outputs)

    trainer(tmp_path, callbacks=[Reader()], max_steps=1, limit_val_batches=1, val_check_interval=1).fit(
        module(base), Rows(batch_size=4)
    )
    assert len(seen) == 2
    for outputs in seen:
        assert outputs["scores"] is outputs["rewards"]
    assert seen[0]["policy_scores"] is seen[0]["confidence"]


@pytest.mark.parametrize("path", MOVED_SETTINGS)
@pytest.mark.parametrize("prefix", ["--model.", "--model.init_args."])
def test_switches_on_the_command_line_are_taken_from_their_old_places(path: str, prefix: str) -> None:
    name = f"{prefix}performance.{MOVED_SETTINGS[path]}"
    assert upgraded_arguments(["fit", f"{prefix}{path}=false"]) == ["fit", f"{name}=false"]
    assert upgraded_arguments([f"{prefix}{path}", "false"]) == [name, "false"]
    assert upgraded_arguments([f"{prefix}{path}s=false"]) == [f"{prefix}{path}s=false"]
    assert MOVED_SETTINGS[path] in vars(PerformanceConfig())


def test_a_configuration_of_this_release_is_left_alone(tmp_path: Path) -> None:
    config = {
        "trainer": {"max_steps": 1},
        "model": {"rollout": {"group_size": 2}, "performance": {"compaction": False}},
    }
    assert upgraded_config(config) == config
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(config))
    for given in (["fit", f"--config={file}"], ["fit", "--config", str(file)], ["fit", "-c", str(file)]):
        assert upgraded_arguments(given) == given
    assert upgraded_arguments(["fit", "--config=missing.yaml"]) == ["fit", "--config=missing.yaml"]


def test_a_switch_that_is_set_in_both_places_is_the_new_ones() -> None:
    both = {"model": {"init_args": {"rollout": {"compaction": True}, "performance": {"compaction": False}}}}
    assert upgraded_config(both)["model"]["init_args"] == {"rollout": {}, "performance": {"compaction": False}}


def test_switches_in_python_are_where_they_belong() -> None:
    with pytest.raises(TypeError, match="compaction"):
        RolloutConfig(compaction=False)  # type: ignore[call-arg]
