"""Data without a single answer or reference is refused before the first rollout, however the lack is written."""

import warnings
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


@pytest.mark.usefixtures("no_rollout")
def test_a_function_that_takes_an_unknown_column(base: str, tmp_path: Path) -> None:
    def topical(completions: list[str], topic: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(TypeError, match=r"'topical' takes \['topic'\], which is no column of the data"):
        trainer(tmp_path).fit(module(base, rewards=[topical]), Rows(batch_size=8))


@pytest.mark.parametrize("steps", [2, 3])
def test_rollouts_without_a_usable_reward_are_warned_of(base: str, tmp_path: Path, steps: int) -> None:
    def unable(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=steps, max_epochs=-1).fit(module(base, rewards=[unable]), Rows(batch_size=4))
    found = [str(each.message) for each in told if "usable reward" in str(each.message)]
    assert len(found) == (steps == 3)


def test_one_usable_rollout_in_three_is_enough(base: str, tmp_path: Path) -> None:
    calls: list[int] = []

    def rarely(completions: list[str]) -> list[float | None]:
        calls.append(len(completions))
        return [float(index) if len(calls) % 3 == 0 else None for index in range(len(completions))]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=8, max_epochs=-1).fit(module(base, rewards=[rarely]), Rows(batch_size=4))
    assert len(calls) == 8
    assert not [each for each in told if "usable reward" in str(each.message)]
