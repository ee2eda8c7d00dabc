"""The quickstart learns, and would not with a wrong sign."""

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_lambdapo.module
from lightning_lambdapo.cli import main
from lightning_lambdapo.functional import lambda_advantages
from lightning_lambdapo.quickstart import __main__ as maker

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def curve(path: Path, column: str) -> list[float]:
    arguments = ["--trainer.max_steps=30", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    main(["fit", f"--config={CONFIG}", f"--trainer.default_root_dir={path}", *arguments])
    with (path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def rise(values: list[float]) -> float:
    assert len(values) == 30
    return sum(values[-5:]) / 5 - sum(values[:5]) / 5


def test_reward_rises(tmp_path: Path) -> None:
    accuracy = curve(tmp_path, "train/accuracy")
    assert 0.3 < sum(accuracy[:2]) / 2 < 0.5
    assert rise(accuracy) > 0.1
    run = tmp_path / "lightning_logs" / "version_0"
    for name in ("config.yaml", "metrics.csv", "reward.png", "completions.jsonl", "export", "checkpoints"):
        assert (run / name).exists()
    model: Any = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    prompt = tokenizer("1+2+3=", return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).startswith("1+2+3=1+2=")


def test_a_wrong_sign_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_lambdapo.module, "lambda_advantages", lambda *a, **k: -lambda_advantages(*a, **k))
    assert rise(curve(tmp_path, "train/accuracy")) < -0.1


def test_demonstrations_are_wrong_as_often_as_they_say() -> None:
    generator = random.Random(0)
    right = 0
    for _ in range(4000):
        prompt, solution = maker.demonstration(generator)
        steps, total = solution.split(";")
        a, b, c = map(int, prompt.rstrip("=").split("+"))
        assert steps.startswith(f"{a}+{b}=")
        assert steps.endswith(f"+{c}={total}")
        right += int(total) == a + b + c and f"={a + b}," in steps
    assert right / 4000 == pytest.approx(0.65**2, abs=0.03)


def test_the_maker_trains_and_writes_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (maker.train(steps=3, rows=8) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    (tmp_path / "mine").write_text("")
    monkeypatch.setattr("sys.argv", ["quickstart", str(tmp_path)])
    with pytest.raises(SystemExit):
        maker.main()
