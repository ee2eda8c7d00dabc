"""What is kept of completions and predictions."""

from pathlib import Path

import pytest
import torch
from small import ROWS, Rows, json_lines, module, trainer

from lightning_lambdapo import CompletionsLogger, RewardPlot
from lightning_lambdapo.functional import lambda_advantages


def test_completions_hold_everything_that_made_the_advantage(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = CompletionsLogger(every_n_rollouts=2, table_every_n_rollouts=3)
    trainer(tmp_path, callbacks=[callback]).fit(module(base), Rows(batch_size=4))
    records = json_lines(tmp_path / "completions.jsonl")
    assert [record["step"] for record in records] == [2] * 16 + [4] * 16
    prompts = {row["prompt_id"]: row["prompt"] for row in ROWS}
    for start in range(0, 32, 4):
        group = records[start : start + 4]
        assert {prompts[record["prompt_id"]] for record in group} == {group[0]["prompt"]}
        assert [record["sample"] for record in group] == [0, 1, 2, 3]
        rewards = torch.tensor([[record["total"] for record in group]])
        scores = torch.tensor([[record["score"] for record in group]])
        expected = lambda_advantages(rewards, scores)[0].tolist()
        assert [record["advantage"] for record in group] == pytest.approx(expected, abs=1e-6)
        for record in group:
            text = record["completion"]
            assert record["rewards"]["digits"] == pytest.approx(sum(map(str.isdigit, text)) / max(len(text), 1))
            assert record["valid"]
    assert "step 3" in capsys.readouterr().out


def test_an_earlier_runs_files_are_never_written_over(base: str, tmp_path: Path) -> None:
    for _ in range(2):
        callbacks = [CompletionsLogger(every_n_rollouts=4), RewardPlot()]
        trainer(tmp_path, callbacks=callbacks).fit(module(base), Rows(batch_size=4))
    assert len(json_lines(tmp_path / "completions.jsonl")) == len(json_lines(tmp_path / "completions-1.jsonl")) == 16
    assert (tmp_path / "reward.png").exists()
    assert (tmp_path / "reward-1.png").exists()


def test_predictions_go_to_jsonl(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, callbacks=[CompletionsLogger()])
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        run.predict(module(base), Rows(batch_size=4))
    assert f"The predictions are in {tmp_path / 'predictions.jsonl'}." in caplog.messages
    records = json_lines(tmp_path / "predictions.jsonl")
    assert [record["prompt_id"] for record in records] == [row["prompt_id"] for row in ROWS]
    assert {"prompt", "completion", "answer", "truncated", "completion_length"} <= records[0].keys()


@pytest.mark.parametrize("settings", [{"every_n_rollouts": 0}, {"table_every_n_rollouts": -1}])
def test_bad_settings(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        CompletionsLogger(**settings)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RewardPlot(every_n_rollouts=0)
