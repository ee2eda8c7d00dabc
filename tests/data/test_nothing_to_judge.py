"""Data without a single answer or reference is refused before the first rollout, however the lack is written."""

from pathlib import Path
from typing import Any

import pytest
from small import ROWS, Digits, Rows, module, trainer

from lightning_lambdapo.rewards import AccuracyReward, FormatReward, SemanticDensityReward
from lightning_lambdapo.rollout.sampler import RolloutSampler

EMPTY = [None, "", " \n"]


class Lacking(Rows):
    """Rows in which some splits have nothing in some fields."""

    def __init__(self, value: Any, splits: str, fields: str) -> None:
        super().__init__(batch_size=8)
        self.value, self.splits, self.fields = value, splits.split(), fields.split()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for split in self.splits:
            self._rows[split] = [row | dict.fromkeys(self.fields, self.value) for row in ROWS]


@pytest.fixture
def no_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RolloutSampler, "complete", lambda *_, **__: pytest.fail("a rollout was paid for"))


@pytest.mark.usefixtures("no_rollout")
@pytest.mark.parametrize("value", EMPTY)
@pytest.mark.parametrize("splits", ["train", "val"])
def test_no_answer_at_all(base: str, tmp_path: Path, value: Any, splits: str) -> None:
    kind = {"train": "training", "val": "validation"}[splits]
    with pytest.raises(ValueError, match=rf"'accuracy' needs answers, and none of the 16 {kind} rows has one"):
        trainer(tmp_path, limit_val_batches=1).fit(
            module(base, rewards=[AccuracyReward(), FormatReward()]), Lacking(value, splits, "answer")
        )


@pytest.mark.usefixtures("no_rollout")
@pytest.mark.parametrize("value", EMPTY)
def test_no_reference_at_all(base: str, tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"'semantic_density' needs references, and none of the 16 training rows"):
        trainer(tmp_path).fit(
            module(base, rewards=[AccuracyReward(), SemanticDensityReward()]), Lacking(value, "train", "reference")
        )


@pytest.mark.usefixtures("no_rollout")
@pytest.mark.parametrize("value", EMPTY)
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_alone(base: str, tmp_path: Path, value: Any, stage: str) -> None:
    judge = trainer(tmp_path, limit_val_batches=1, limit_test_batches=1)
    kind = {"validate": "validation", "test": "test"}[stage]
    with pytest.raises(ValueError, match=rf"'accuracy' needs answers, and none of the 16 {kind} rows has one"):
        getattr(judge, stage)(module(base, rewards=[AccuracyReward()]), Lacking(value, "val test", "answer"))


def test_one_reward_may_be_without_its_field_in_evaluation(base: str, tmp_path: Path) -> None:
    model = module(base, rewards=[AccuracyReward(), SemanticDensityReward()])
    judge = trainer(tmp_path, limit_val_batches=1, limit_train_batches=1)
    [found] = judge.validate(model, Lacking("", "val", "reference"), verbose=False)
    assert "val/reward/accuracy" in found
    assert not [name for name in found if "density" in name]
    judge.fit(model, Lacking("", "val", "reference"))
    # No reward needs anything, or nothing is validated.
    judge.validate(module(base, rewards=[Digits()]), Lacking("", "val", "answer reference"), verbose=False)
    trainer(tmp_path, limit_train_batches=1).fit(
        module(base, rewards=[AccuracyReward(), Digits()]), Lacking("", "val", "answer")
    )


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_without_answers_it_is_said_that_nothing_is_accurate(base: str, tmp_path: Path, stage: str) -> None:
    model = module(base, rewards=[AccuracyReward(), SemanticDensityReward()])
    run = trainer(tmp_path, limit_val_batches=1, limit_train_batches=1)
    with pytest.warns(UserWarning, match=r"None of the 16 validation rows has an answer, so accuracy, pass@k") as told:
        getattr(run, stage)(model, Lacking("", "val", "answer"))
    assert len([each for each in told if "has an answer" in str(each.message)]) == 1
    assert "val/reward" in run.callback_metrics
    assert not [name for name in run.callback_metrics if name.startswith("val/") and "pass_at" in name]
