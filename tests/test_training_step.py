import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from small import Digits, Outputs, Rows, Same, fit, module, trainer

from lightning_lambdapo import AdapterConfig, AlgorithmConfig, LambdaPOModule, PolicyConfig, PromptBatch, RolloutConfig
from lightning_lambdapo.functional import group_advantages, lambda_advantages
from lightning_lambdapo.rewards import Reward, RewardInputs


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_truncated": True},
        {"weighting": "agreement", "temperature": 0.3, "reduction": "sum", "center": True, "scale": "group"},
        {"weighting": "lambdarank", "score": "sum", "reduction": "weighted_mean", "scale": "batch"},
        {"estimator": "grpo", "mask_truncated": True},
    ],
)
def test_advantages_are_those_of_the_settings(base: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    outputs = Outputs()
    fit(tmp_path, module(base, algorithm=AlgorithmConfig(**settings)), callbacks=[outputs])
    plain = {name: value for name, value in settings.items() if name not in ("score", "mask_truncated", "estimator")}
    for step in outputs.steps:
        rollout, scores = step["rollout"], step["rewards"]
        summed = torch.where(rollout.completion_mask, rollout.sampling_logprobs, 0.0).sum(-1)
        expected = summed if settings.get("score") == "sum" else summed / rollout.lengths
        torch.testing.assert_close(step["confidence"].flatten(), expected)
        truncated = rollout.truncated.view_as(scores.valid)
        assert torch.equal(scores.valid, ~truncated if settings.get("mask_truncated") else torch.ones_like(truncated))
        if "estimator" in settings:
            wanted = group_advantages(scores.total, estimator="grpo", valid=scores.valid)
        else:
            wanted = lambda_advantages(scores.total, step["confidence"], valid=scores.valid, **plain)
        torch.testing.assert_close(step["advantages"], wanted.flatten())


def test_rollouts_are_made_in_eval_mode(base: str, tmp_path: Path) -> None:
    """In train mode checkpointing drops the cache, and dropout samples from a policy that is never scored."""
    checkpointing = PolicyConfig(base, gradient_checkpointing=True)
    steps = fit(tmp_path, module(base, policy=checkpointing, lora=AdapterConfig(r=4)))
    assert max(step["train/sampling_drift_max"] for step in steps) < 1e-4
    texts = []
    for dropout in (0.0, 0.9):
        outputs = Outputs()
        lora = AdapterConfig(r=4, dropout=dropout, options={"init_lora_weights": False})
        fit(tmp_path, module(base, lora=lora), callbacks=[outputs], limit_train_batches=1)
        texts.append(outputs.steps[0]["rollout"].texts)
    assert texts[0] == texts[1]


class Texts(Callback):
    """Keeps the completions of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[tuple[str, int], str]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        records = outputs["rollout"].records(batch)
        self.steps.append({(record["prompt"], record["sample"]): record["completion"] for record in records})


def test_every_step_draws_anew_and_every_run_the_same(base: str, tmp_path: Path) -> None:
    runs = []
    for seed in (3, 3, 4):
        texts = Texts()
        model = module(base, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), seed=seed)
        trainer(tmp_path, callbacks=[texts], max_epochs=2).fit(model, Rows(batch_size=16))
        runs.append(texts.steps)
    first, again, other = runs
    assert first == again
    assert first[0].keys() == first[1].keys()
    for one, two in ((first[0], first[1]), (first[0], other[0])):
        assert sum(one[key] == two[key] for key in one) < len(one) // 4


def test_both_engines_train_alike(base: str, tmp_path: Path) -> None:
    texts = []
    for engine in ("grouped", "hf"):
        outputs = Outputs()
        rollout = RolloutConfig(engine=engine, group_size=4, max_new_tokens=8)
        model = module(base, rollout=rollout, policy=PolicyConfig(base, dtype="float64"))
        fit(tmp_path, model, callbacks=[outputs], precision="64-true")
        texts.append([step["rollout"].texts for step in outputs.steps])
    assert texts[0] == texts[1]


class Picky(Reward):
    """Right where the prompt starts with 1, wrong where with 0, not applicable elsewhere."""

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        return [{"0": 0.0, "1": 1.0}.get(prompt[0]) for prompt in inputs.prompts]


def test_accuracy_is_over_the_rows_it_applies_to(base: str, tmp_path: Path) -> None:
    model = module(base, rewards=[Picky(name="accuracy")])
    run = trainer(tmp_path, limit_val_batches=1.0)
    run.fit(model, Rows(batch_size=16))
    assert run.callback_metrics["train/accuracy"] == 0.5
    assert run.callback_metrics["train/reward/accuracy"] == 0.5
    assert run.callback_metrics["train/valid"] == 0.5
    assert run.callback_metrics["val/pass_at_1"] == 0.5
    assert run.callback_metrics["val/avg_at_1"] == 0.5


def test_what_has_no_value_in_a_step_is_left_out(base: str, tmp_path: Path) -> None:
    """Rows of the second and third step are right or wrong, those of the others nothing the reward could judge."""

    class Sometimes(Same):
        calls = 0

        def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
            self.calls += 1
            return [float(self.calls) if self.calls in (2, 3) else None for _ in inputs.completions]

    class Own(LambdaPOModule):
        def training_step(self, batch: PromptBatch, batch_idx: int) -> Any:
            if batch_idx != 3:
                self.log("train/own", float(batch_idx))
            return super().training_step(batch, batch_idx)

    model = Own(PolicyConfig(base), rollout=RolloutConfig(max_new_tokens=4), rewards=[Digits(), Sometimes(name="some")])
    run = trainer(tmp_path, logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    run.fit(model, Rows(batch_size=4))
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["train/reward/some"] for row in rows] == ["", "2.0", "3.0", ""]
    assert all(row["train/reward/digits"] for row in rows)
    assert "train/reward/some" not in run.callback_metrics
    assert run.callback_metrics["train/own"] == 2.0, "what a subclass logs is its own affair"
