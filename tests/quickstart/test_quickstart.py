"""The quickstart learns, and would not with a wrong sign."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lambdapo.commands.main import main
from lightning_lambdapo.functional import lambda_advantages
from lightning_lambdapo.learning import estimating
from lightning_lambdapo.quickstart import __main__ as maker
from lightning_lambdapo.quickstart.tasks import TASKS, steps_right, task_rows

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def demonstration(task: str, generator: random.Random) -> tuple[str, str]:
    draw = TASKS[task].demonstration
    assert draw is not None
    return draw(generator)


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
    monkeypatch.setattr(estimating, "lambda_advantages", lambda *a, **k: -lambda_advantages(*a, **k))
    assert rise(curve(tmp_path, "train/accuracy")) < -0.1


def test_demonstrations_are_wrong_as_often_as_they_say() -> None:
    generator = random.Random(0)
    right = 0
    for _ in range(4000):
        prompt, solution = demonstration("sums", generator)
        steps, total = solution.split(";")
        a, b, c = map(int, prompt.rstrip("=").split("+"))
        assert steps.startswith(f"{a}+{b}=")
        assert steps.endswith(f"+{c}={total}")
        right += int(total) == a + b + c and f"={a + b}," in steps
    assert right / 4000 == pytest.approx(0.65**2, abs=0.03)


def test_the_other_tasks_slip_as_often_as_they_say() -> None:
    generator = random.Random(0)
    chains, places = 0, 0
    for _ in range(2000):
        prompt, solution = demonstration("chain", generator)
        terms = [int(term) for term in prompt.rstrip("=").split("+")]
        totals = [sum(terms[: count + 1]) for count in range(len(terms))]
        steps = [f"{totals[at]}+{terms[at + 1]}={totals[at + 1]}" for at in range(3)]
        chains += solution == f"{','.join(steps)};{totals[-1]}"
        prompt, solution = demonstration("sorting", generator)
        right = sorted(prompt.rstrip("=").split(","))
        places += sum(map(str.__eq__, solution.split(","), right))
    assert chains / 2000 == pytest.approx(0.7**3, abs=0.03)
    assert places / 2000 / 8 == pytest.approx(0.65 + 0.35 / 10, abs=0.02)


def test_rows_of_a_task() -> None:
    rows = task_rows("chain", 50, seed=3)
    assert len({row["prompt"] for row in rows}) == 50
    assert rows == task_rows("chain", 50, seed=3) != task_rows("chain", 50, seed=4)
    for row in rows:
        terms = [int(term) for term in row["prompt"].rstrip("=").split("+")]
        assert int(row["answer"]) == sum(terms)
        assert row["reference"].endswith(f"={sum(terms)};{sum(terms)}")
        assert steps_right([row["reference"]], [row["reference"]]) == [1.0]
    assert all(sorted(row["prompt"][:-1].split(",")) == row["answer"].split(",") for row in task_rows("sorting", 9))
    names = "sums, sorting, chain, large_sums, rough_sums, long_sorting, last_digits, misled, short_sorting"
    with pytest.raises(ValueError, match=f"the tasks {names}; got 'chess'"):
        task_rows("chess", 1)
    with pytest.raises(ValueError, match="fewer than 7000 different problems"):
        task_rows("sums", 7000)


def test_tasks_that_are_hardly_ever_solved() -> None:
    generator = random.Random(0)
    for row in task_rows("last_digits", 20):
        first, *rest = [int(digit) for digit in row["prompt"].rstrip("=").split("+")]
        assert len(rest) == 6
        wanted = str(first)
        for digit in rest:
            first = (first + digit) % 10
            wanted += f"+{digit}={first}"
        assert row["answer"] == wanted
        assert row["reference"] == row["answer"]
    right = 0
    for _ in range(4000):
        prompt, solution = demonstration("last_digits", generator)
        digits = [int(digit) for digit in prompt.rstrip("=").split("+")]
        assert [int(digit) for digit in solution[2::4]] == digits[1:]
        running = [int(digit) for digit in solution[::4]]
        assert running[0] == digits[0]
        assert len(running) == 7
        right += sum((a + b) % 10 == c for a, b, c in zip(running, digits[1:], running[1:], strict=False))
    assert abs(right / (4000 * 6) - 0.55) < 0.02
    terms = {int(term) for row in task_rows("large_sums", 400) for term in row["prompt"].rstrip("=").split("+")}
    assert terms == set(range(10, 31))
    assert all(row["answer"] == row["reference"] for row in task_rows("large_sums", 9))
    shown = [demonstration("large_sums", generator)[0] for _ in range(400)]
    assert {int(term) for prompt in shown for term in prompt.rstrip("=").split("+")} == set(range(1, 20))
    rough = [solution for _ in range(4000) for _, solution in [demonstration("rough_sums", generator)]]
    steps = [step for solution in rough for step in solution.partition(";")[0].split(",")]
    right = sum(int(a) + int(b) == int(c) for a, b, c in (step.replace("=", "+").split("+") for step in steps))
    assert abs(right / (4000 * 3) - 0.2) < 0.02
    assert all(len(row["answer"].split(",")) == 10 for row in task_rows("long_sorting", 9))


def test_a_misled_policy_sees_the_same_error_in_nine_of_ten() -> None:
    generator = random.Random(0)
    errors = []
    for _ in range(4000):
        prompt, solution = demonstration("misled", generator)
        a, b, c = map(int, prompt.rstrip("=").split("+"))
        assert solution.startswith(f"{a}+{b}={a + b},{a + b}+{c}=")
        errors.append(int(solution.rpartition(";")[2]) - (a + b + c))
    assert set(errors) == {0, 10}
    assert abs(errors.count(10) / 4000 - 0.9) < 0.02


def test_levels_count_steps_in_their_places() -> None:
    reference = "1+2=3,3+3=6,6+4=10;10"
    completions = ["1+2=3,3+3=6,6+4=10;10", "1+2=3,3+3=7,7+4=11;11", "3+3=6,1+2=3", "1+2=3,3+3=6,6+4=10,1+1=2", ""]
    assert steps_right(completions, [reference] * 5) == [1.0, 1 / 3, 0.0, 1.0, 0.0]


def test_the_maker_trains_and_writes_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (maker.train(steps=3, rows=8) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    (tmp_path / "mine").write_text("")
    monkeypatch.setattr("sys.argv", ["quickstart", str(tmp_path)])
    with pytest.raises(SystemExit):
        maker.main()


def test_the_maker_writes_policy_and_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = maker.train("chain", steps=2, rows=4)
    asked: list[str] = []

    def train(task: str, seed: int) -> Any:
        asked.append(f"{task} {seed}")
        return short

    monkeypatch.setattr(maker, "train", train)
    monkeypatch.setattr("sys.argv", ["quickstart", str(tmp_path / "new"), "--task", "chain", "--seed", "5"])
    maker.main()
    assert asked == ["chain 5"]
    rows = {
        name: [json.loads(line) for line in (tmp_path / "new" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    assert {name: len(part) for name, part in rows.items()} == {"train": 5000, "test": 600}
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["test"]}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.hidden_size == 96


def test_problems_for_a_model_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quickstart", str(tmp_path / "new"), "--task", "short_sorting"])
    maker.main()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["test.jsonl", "train.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "new" / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 600
    for row in rows:
        digits = row["prompt"].removesuffix("=").split(",")
        assert len(digits) == 4
        assert row["reference"] == row["answer"] == ",".join(sorted(digits))
    assert {digit for row in rows for digit in row["answer"].split(",")} == set("0123456789")
    with pytest.raises(ValueError, match="short_sorting has problems alone"):
        maker.train("short_sorting", steps=1)
