import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from small import ROWS

from lightning_lambdapo import LambdaPOModule
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.config import AlgorithmConfig, EvaluationConfig, RolloutConfig, SamplingConfig, from_mapping


def test_fit_validate_test_predict(arguments: list[str], tmp_path: Path) -> None:
    for command in ("fit", "validate", "test", "predict"):
        more = ["--trainer.max_steps=2", "--trainer.max_epochs=1"] if command == "fit" else []
        main([command, *arguments, *more])
    runs = [tmp_path / "lightning_logs" / f"version_{number}" for number in range(4)]
    assert len((runs[0] / "completions.jsonl").read_text().splitlines()) == 2 * 4 * 2
    assert "val/pass_at_1" in (runs[1] / "metrics.csv").read_text()
    assert "test/pass_at_1" in (runs[2] / "metrics.csv").read_text()
    assert len((runs[3] / "predictions.jsonl").read_text().splitlines()) == 6
    assert all((run / "config.yaml").exists() for run in runs)


def test_a_finished_run_without_validation_data_may_be_run_again(arguments: list[str], tmp_path: Path) -> None:
    kept = [each for each in arguments if not each.startswith("--data.val")]
    saves = ["--trainer.callbacks+=lightning_lambdapo.RolloutCheckpoint", "--trainer.callbacks.every_n_rollouts=1"]
    limits = ["--trainer.max_steps=4", "--trainer.val_check_interval=2"]
    for number, more in enumerate(([], ["--ckpt_path=last"])):
        main(["fit", *kept, *saves, *limits, *more])
        assert (tmp_path / "lightning_logs" / f"version_{number}" / "config.yaml").exists()
    held = torch.load(tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert held["lambdapo"]["owes_validation"] is False


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # Lightning's word on what barebones means
def test_barebones(arguments: list[str], tmp_path: Path) -> None:
    kept = [each for each in arguments if "callbacks" not in each and "log_every" not in each]
    main(["fit", *kept, "--trainer.barebones=true", "--trainer.max_steps=2", "--trainer.max_epochs=1"])
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored")
def test_peft_settings_and_plain_functions_by_name(arguments: list[str], tmp_path: Path) -> None:
    lora = "{class_path: peft.LoraConfig, init_args: {r: 3, target_modules: [q_proj], task_type: CAUSAL_LM}}"
    accuracy = "{class_path: lightning_lambdapo.rewards.AccuracyReward, init_args: {weight: 2.0}}"
    rewards = f"[{accuracy}, named_rewards.lambda_free_reward]"
    more = [
        f"--model.lora={lora}",
        f"--model.rewards={rewards}",
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=0",
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"shade": 1}) + "\n" for row in ROWS))
    main(["fit", *arguments, *more])
    run = tmp_path / "lightning_logs" / "version_0"
    assert "train/reward/lambda_free_reward" in (run / "metrics.csv").read_text()
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    again = LambdaPOModule.load_from_checkpoint(checkpoint)
    assert isinstance(again.lora, LoraConfig)
    assert again.lora.r == 3
    assert [reward.name for reward in again.rewards] == ["accuracy", "lambda_free_reward"]
    assert again.rewards[0].weight == 2.0


def test_threads(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    main(["validate", *arguments])
    main(["validate", *arguments, "--num_threads=3"])
    assert asked == [3]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.rollout.groupsize=4", "groupsize"),
        ("--model.algorithm.weighting=sideways", "sideways"),
        ("--model.rollout.group_size=1", "a pairwise advantage needs a peer"),
        ("--model.rollout.sampling.temperature=0", "greedy decoding makes all rollouts of a group the same"),
        ("--data.train.preset=gsm9k", "gsm9k"),
    ],
)
def test_mistakes_are_found_while_parsing(
    arguments: list[str], argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        main(["fit", *arguments, argument])
    assert message in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "sideways"}, "`algorithm.weighting` must be one of uniform, confidence, agreement, lambdarank"),
        (
            {"estimator": "ppo"},
            "`algorithm.estimator` must be one of lambda, grpo, dr_grpo, rloo, or the import path",
        ),
        ({"temperature": 0.0}, '`algorithm.temperature` must be a finite number above 0 or "group_std", got 0.0'),
        ({"temperature": "batch_std"}, "got 'batch_std'"),
        ({"clip_low": 1.5}, "`clip_low` must be in"),
        ({"clip_high": -0.1}, "`clip_high` at least 0, got 0.2 and -0.1"),
        ({"kl_coef": -1.0}, "`kl_coef` must be finite and at least 0"),
    ],
)
def test_bad_algorithm_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "`validation.num_samples` must be at least 1"),
        ({"num_samples": 2, "k": [1, 4]}, r"numbers from 1 to num_samples = 2, got \[1, 4\]"),
        ({"num_samples": 2, "k": [2]}, "greedy decoding gives the same completion every time"),
        ({"max_new_tokens": 0}, "`validation.max_new_tokens` must be at least 1"),
    ],
)
def test_bad_evaluation_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**settings)


def test_configs_come_back_from_plain_mappings() -> None:
    found = from_mapping(RolloutConfig, {"group_size": 3, "sampling": {"temperature": 0.5}})
    assert found == RolloutConfig(group_size=3, sampling=SamplingConfig(temperature=0.5))
    with pytest.raises(TypeError, match="groupsize"):
        from_mapping(RolloutConfig, {"groupsize": 3})


@pytest.mark.parametrize("name", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_memory_grows_in_place_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str | None
) -> None:
    names = ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"]
    for each in names:
        monkeypatch.delenv(each, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:128")
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    found = {each: os.environ[each] for each in names if each in os.environ}
    expected = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert found == (expected if name is None else {name: "max_split_size_mb:128"})
    assert not torch.cuda.is_initialized()
