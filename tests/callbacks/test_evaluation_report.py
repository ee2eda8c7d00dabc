"""What validate and test write equals what they log, on any number of ranks; predictions scored again give the same."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fitting
import pytest
from lightning.pytorch import Trainer
from ranks import on_ranks, succeed
from small import ROWS, Digits, Rows, module, trainer

from lightning_lambdapo import EvaluationConfig, EvaluationReport, LambdaPOModule, SamplingConfig
from lightning_lambdapo.callbacks.completions import CompletionsLogger
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.rewards import Reward, RewardInputs

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SAMPLED = EvaluationConfig(num_samples=4, k=[1, 2, 4], sampling=SamplingConfig(temperature=1.0))


class FirstLetter(Reward):
    """Right where a completion's first letter is of the alphabet's first half; the letter is the vote."""

    def __init__(self) -> None:
        super().__init__(1.0, "accuracy")

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        return [
            None if prompt.startswith("3") else float("a" <= text[:1] <= "m")
            for prompt, text in zip(inputs.prompts, inputs.completions, strict=True)
        ]

    def vote(self, completion: str) -> str | None:
        return completion[:1] or None


class Subjects(Rows):
    """13 rows, so that of two ranks with batches of 3 or 1 one has a batch more; subjects go by the second term."""

    def __init__(self, only: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        rows = [row | {"subject": f"plus {row['prompt_id'] % 4}"} for row in ROWS[3:]]  # type: ignore[operator]
        self.rows = [row for row in rows if only in (None, row["subject"])]

    def setup(self, stage: str) -> None:
        self._rows = {split: list(self.rows) for split in ("val", "test", "predict", "train")}


def evaluated(base: str, path: Path, **settings: Any) -> tuple[dict[str, Any], Trainer]:
    run = trainer(path, callbacks=[EvaluationReport()])
    model = module(base, rewards=[FirstLetter(), Digits()], validation=SAMPLED)
    run.test(model, Subjects(batch_size=5, **settings), verbose=False)
    return json.loads((path / "results.json").read_text()), run


def test_the_report_is_what_is_logged(base: str, tmp_path: Path) -> None:
    found, run = evaluated(base, tmp_path)
    logged = {name.removeprefix("test/"): float(value) for name, value in run.callback_metrics.items()}
    assert {"avg_at_4", "pass_at_1", "pass_at_2", "maj_at_4", "truncated", "reward/digits"} <= found["metrics"].keys()
    assert 0 < logged["maj_at_4"] < 1
    assert logged["pass_at_1"] < logged["pass_at_2"] < logged["pass_at_4"]
    for name, estimate in found["metrics"].items():
        assert estimate["value"] == pytest.approx(logged[name], abs=1e-6), name
        assert estimate["low"] <= estimate["value"] <= estimate["high"], name
    assert (found["prompts"], found["judged_prompts"], found["samples_per_prompt"]) == (13, 9, [4, 4])
    assert found["settings"]["decoding"] == {"temperature": 1.0, "max_new_tokens": 8}
    assert found["settings"]["model"] == base
    assert found["settings"]["seed"] == 3
    assert "| maj@4 |" in (tmp_path / "results.md").read_text()


def test_a_subjects_row_is_an_evaluation_of_that_subject(base: str, tmp_path: Path) -> None:
    found, _ = evaluated(base, tmp_path / "all")
    assert [some["prompts"] for some in found["subjects"].values()] == [3, 3, 3, 4]
    for subject in ("plus 1", "plus 3"):
        _, run = evaluated(base, tmp_path / subject, only=subject)
        for name, estimate in found["subjects"][subject]["metrics"].items():
            expected = float(run.callback_metrics[f"test/{name}"])
            assert estimate["value"] == pytest.approx(expected, abs=1e-6), name


def test_validation_inside_fit_writes_nothing(base: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[EvaluationReport()], limit_val_batches=1.0, max_steps=2)
    model = module(base, validation=SAMPLED)
    run.fit(model, Subjects(batch_size=4))
    assert not list(tmp_path.glob("results*"))
    run.validate(model, Subjects(batch_size=4), verbose=False)
    assert sorted(path.name for path in tmp_path.glob("results*")) == ["results.json", "results.md"]


def test_a_step_that_returns_nothing_is_said(base: str, tmp_path: Path) -> None:
    class Silent(LambdaPOModule):
        def test_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            super().test_step(batch, batch_idx)

    model = Silent(policy=module(base).policy_config, rewards=[Digits()])
    with pytest.warns(UserWarning, match="the module's test step returned no `outcomes`"):
        trainer(tmp_path, callbacks=[EvaluationReport()]).test(model, Subjects(batch_size=8), verbose=False)
    assert not list(tmp_path.glob("results*"))


def evaluate_and_predict(base: str, path: Path, how: str, batch_size: int) -> None:
    settings = fitting.strategy(how) | {"callbacks": [EvaluationReport(), CompletionsLogger()]}
    kind = "full" if how == "fsdp1" else "full64"
    model = module(base, rewards=[FirstLetter()], validation=SAMPLED, **fitting.policy_settings(base, kind))
    run = trainer(path, **settings)
    data = Subjects(batch_size=batch_size)
    logged = run.test(model, data, verbose=False)[0]
    if run.is_global_zero:
        (path / "logged.json").write_text(json.dumps(logged))
    run.predict(model, data, return_predictions=False)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "batch_size"), [("ddp", 3), ("ddp", 1), ("fsdp", 3)])
def test_ranks_with_unlike_numbers_of_prompts(base: str, tmp_path: Path, how: str, batch_size: int) -> None:
    found: list[Any] = []
    for count, name in ((1, "one"), (2, how)):
        path = tmp_path / str(count)
        arguments = (base, path, name, batch_size)
        succeed(on_ranks(count, evaluate_and_predict, *arguments, logs=path / "logs"))
        found.append([json.loads((path / file).read_text()) for file in ("results.json", "logged.json")])
        lines = [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]
        found[-1].append(sorted((line["prompt_id"], line["sample"], line["completion"]) for line in lines))
    (alone, alone_logged, alone_predicted), (together, logged, predicted) = found
    assert together["prompts"] == 13
    assert together["outcomes"] == alone["outcomes"]
    assert (together["metrics"], together["subjects"]) == (alone["metrics"], alone["subjects"])
    for name, value in logged.items():
        assert value == pytest.approx(alone_logged[name], abs=1e-6), name
    assert predicted == alone_predicted
    assert len({line[:2] for line in predicted}) == 13 * 4


@pytest.mark.parametrize("callbacks", [[], ["--trainer.callbacks+=lightning_lambdapo.EvaluationReport"]])
def test_predictions_scored_again_give_what_test_gave(tmp_path: Path, callbacks: list[str]) -> None:
    arguments = [
        f"--config={CONFIG}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
        "--data.test.limit=24",
        # Greedy, as test and predict have sampling streams of their own; so short that some answers are cut off.
        "--model.validation={num_samples: 1, k: [1], sampling: {temperature: 0}, max_new_tokens: 16}",
        "--trainer.callbacks=[]",
    ]
    main(["test", *arguments, *callbacks])
    main(["predict", *arguments])
    tested, predicted = (tmp_path / "lightning_logs" / f"version_{number}" for number in range(2))
    expected = json.loads((tested / "results.json").read_text())
    assert not (tested / "results-1.json").exists()
    assert not (predicted / "results.json").exists()
    file = predicted / "predictions.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    assert first["reference"].startswith(first["prompt"].removesuffix("=").rpartition("+")[0])
    main(["score", str(file), "--reward", "SemanticDensityReward"])
    main(["score", str(file), "--preset", "arithmetic", "--split", "test", "--output", str(tmp_path / "again")])
    for path in (predicted, tmp_path / "again"):
        found = json.loads((path / "predictions.results.json").read_text())
        assert 0.1 < found["metrics"]["pass_at_1"]["value"] < 0.9
        assert found["metrics"].items() <= expected["metrics"].items()
        assert {"pass_at_1", "completion_length", "truncated", "reward/accuracy"} <= found["metrics"].keys()
        assert found["prompts"] == 24
    assert (predicted / "predictions.results.md").exists()
