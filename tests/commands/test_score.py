"""Files of completions, our own and foreign ones, judged without a model."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_lambdapo.commands.main import main
from lightning_lambdapo.commands.score import score_file
from lightning_lambdapo.data import DataSource, load_rows
from lightning_lambdapo.rewards import AccuracyReward

FOREIGN: list[dict[str, Any]] = [
    {"prompt": "2+5?", "completion": "so 7", "answer": 7, "subject": "sums"},
    {"prompt": "9-1?", "completion": "The answer is 9.", "answer": "8", "subject": "differences"},
    {"prompt": "2+5?", "completion": "#### 8", "answer": 7, "subject": "sums"},
    {"prompt": "9-1?", "completion": r"\boxed{8}", "answer": "8", "subject": "differences"},
    {"prompt": "9-1?", "completion": "eight? 8.0", "answer": "8", "subject": "differences"},
]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def values(found: dict[str, Any]) -> dict[str, float]:
    return {name: each["value"] for name, each in found["metrics"].items()}


def test_foreign_files_are_grouped_by_prompt(tmp_path: Path) -> None:
    found = score_file(write(tmp_path / "a.jsonl", *FOREIGN), [AccuracyReward()])
    # 2+5: 7, 8; the tie goes to 7. 9-1: 9, 8, 8.0; of the first two 9 is first.
    assert values(found) == pytest.approx(
        {"pass_at_1": (1 / 2 + 2 / 3) / 2, "pass_at_2": 1.0, "maj_at_2": 0.5, "reward/accuracy": 3 / 5}
    )
    assert (found["prompts"], found["completions"], found["samples_per_prompt"]) == (2, 5, [2, 3])
    assert {name: values(some)["maj_at_2"] for name, some in found["subjects"].items()} == {
        "differences": 0.0,
        "sums": 1.0,
    }
    with pytest.raises(ValueError, match="k = 3 needs 3 samples of each prompt, and prompt 0 has 2"):
        score_file(tmp_path / "a.jsonl", [AccuracyReward()], k=[1, 3])


def test_scattered_samples_find_their_prompt_and_subject(tmp_path: Path) -> None:
    rows = [
        {"prompt_id": name, "prompt": name, "completion": text, "answer": "1", "subject": f"of {name}"}
        for name, text in (("a", "1"), ("a", "2"), ("b", "1"), ("a", "3"))
    ]
    found = score_file(write(tmp_path / "a.jsonl", *rows), [AccuracyReward()])
    subjects = {name: (some["completions"], values(some)["pass_at_1"]) for name, some in found["subjects"].items()}
    assert subjects == {"of a": (3, pytest.approx(1 / 3)), "of b": (1, 1.0)}


def test_the_report_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", *(row | {"limit": 7, "prompt": [{"content": row["prompt"]}]} for row in FOREIGN))
    for _ in range(2):
        main(["score", str(file), "--k", "1", "--reward", "named_rewards.brief", "FormatReward"])
    names = ["a.jsonl", "a.results-1.json", "a.results-1.md", "a.results.json", "a.results.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    printed = capsys.readouterr().out
    assert "# Results of a.jsonl" in printed
    assert "| pass@1 | 0.583 |" in printed
    found = json.loads((tmp_path / "a.results.json").read_text())
    assert values(found)["reward/brief"] == 2 / 5
    assert "reward/format" in values(found)
    assert "maj_at_2" not in values(found)


def test_completions_of_a_training_run(tmp_path: Path) -> None:
    rows = [
        {"step": step, "prompt_id": 4, "sample": i, "prompt": "1+1=", "completion": text, "completion_length": 3 * step}
        | {"truncated": step == 2, "answer": "2", "rewards": {"accuracy": 0.0}, "total": 0.0}
        for step, texts in ((1, ("2", "3")), (2, ("2", "2")))
        for i, text in enumerate(texts)
    ]
    found = score_file(write(tmp_path / "completions.jsonl", *rows), [AccuracyReward()])
    assert found["settings"]["training_steps"] == "1 to 2, whose policies differ"
    expected = {"avg_at_4": 0.75, "pass_at_1": 0.75, "pass_at_4": 1.0, "maj_at_4": 1.0, "completion_length": 4.5}
    assert values(found) == expected | {"truncated": 0.5, "reward/accuracy": 0.75}


def test_answers_of_a_data_set_by_id_and_by_text(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", *({"input": f"What is {i} + 1 ?", "target": i + 1} for i in range(4)))
    rows = [
        {"prompt_id": i, "prompt": f"<user>What  is {i} + 1 ?\n<assistant>", "completion": f"it is {i + i % 2}"}
        for i in (3, 0, 2)
    ]
    source = DataSource(preset="mawps", path=str(data), columns={"subject": "input"})
    found = score_file(write(tmp_path / "a.jsonl", *rows), [AccuracyReward()], source=source)
    assert values(found)["pass_at_1"] == 1 / 3  # 3 + 1 alone
    assert values(found["subjects"]["What is 3 + 1 ?"])["pass_at_1"] == 1.0
    assert "completion_length" not in values(found)
    bare = [{"prompt": f"What is {i} + 1 ?", "completion": f"it is {i + i % 2}", "answer": "0"} for i in (3, 0, 2)]
    again = score_file(write(tmp_path / "b.jsonl", *bare), [AccuracyReward()], source=source)
    assert values(again) == values(found)  # the file's own answers do not count


PREDICTED: dict[str, Any] = {"prompt_id": 1, "prompt": "What is 1 + 1 ?", "completion": "2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([FOREIGN[0], '{"prompt": "a"'], r"a\.jsonl, line 2 is not valid JSON"),
        ([FOREIGN[0], {"prompt": "a", "answer": "1"}], r"a\.jsonl, line 2: it has no `completion`\. It has 'prompt'"),
        ([{"completion": "a", "answer": "1"}], r"a\.jsonl, line 1: it has no `prompt`"),
        ([FOREIGN[0] | {"completion": ["7"]}], r"line 1: its `completion` must be a text, got \['7'\]"),
        ([FOREIGN[0] | {"prompt_id": 1.5}], r"its `prompt_id` must be a whole number or a text, got 1\.5"),
        ([FOREIGN[0] | {"prompt_id": True}], r"its `prompt_id` must be a whole number or a text, got True"),
        ([FOREIGN[0] | {"truncated": 0}], r"its `truncated` must be true or false, got 0"),
        ([FOREIGN[0] | {"completion_length": "9"}], r"its `completion_length` must be a whole number, got '9'"),
        ([FOREIGN[0] | {"columns": [1]}], r"its `columns` must be an object with named columns, got \[1\]"),
        ([FOREIGN[0] | {"answer": [7]}], r"line 1: an answer or reference must be text or a number"),
        ([], r"a\.jsonl has no lines"),
        (["", PREDICTED, PREDICTED], r"a\.jsonl, line 2 has no `answer`, and neither has any other line\. .*--preset"),
        (
            [PREDICTED | {"answer": "2"}, PREDICTED | {"answer": "2", "prompt": "What is 2 + 2 ?"}],
            r"line 2: prompt_id 1 has the prompt 'What is 2 \+ 2 \?', and 'What is 1 \+ 1 \?' in .*line 1\. Put",
        ),
        (
            [PREDICTED | {"answer": "2"}, PREDICTED | {"answer": "3"}],
            r"line 2: prompt_id 1 has the answer '3', and '2'",
        ),
    ],
)
def test_bad_files_name_file_and_line(
    tmp_path: Path, rows: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(ValueError, match=message):
        score_file(file, [AccuracyReward()])
    with pytest.raises(SystemExit) as error:
        main(["score", str(file)])
    assert error.value.code == 2
    assert "lambdapo score: error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_id": 2}, r"line 1: its prompt is not that of prompt_id 2 in .*, 'What is 2 \+ 1 \?'\. Choose"),
        ({"prompt_id": 9}, r"line 1: .*data\.jsonl \(4 rows\) has no such prompt with prompt_id 9"),
        ({"prompt_id": None, "prompt": "What is 9 + 1 ?"}, r"line 1: .*data\.jsonl \(4 rows\) has no such prompt\."),
    ],
)
def test_answers_of_other_data_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = write(tmp_path / "data.jsonl", *({"input": f"What is {i} + 1 ?", "target": i + 1} for i in range(4)))
    file = write(tmp_path / "a.jsonl", PREDICTED | change)
    with pytest.raises(ValueError, match=message):
        score_file(file, [AccuracyReward()], source=DataSource(preset="mawps", path=str(data)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--path", "x"], "give --preset too"),
        (["--preset", "gsm9k"], "invalid choice: 'gsm9k'"),
        (["--k", "0"], "--k must be at least 1, got 0"),
        (["--reward", "no_such_module.thing"], "cannot be imported"),
        (["--reward", "LengthPenalty"], "needs arguments"),
        (
            ["--reward", "named_rewards.counted"],
            "'counted' raised ValueError: {file}, line 1 has no `completion_length`",
        ),
        (
            ["--reward", "named_rewards.cut"],
            "'cut' raised ValueError: {file}, line 1 has no `truncated`, which the reward",
        ),
        (["--reward", "named_rewards.Long"], "'Long' raised ValueError: {file}, line 1 has no `completion_length`"),
        (["--reward", "named_rewards.NO_REWARD"], "must be a Reward object or a function"),
        (["--format", "letter"], "needs gold answers from A to J"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["score", str(write(tmp_path / "a.jsonl", *FOREIGN)), *arguments])
    assert error.value.code == 2
    assert message.format(file=tmp_path / "a.jsonl") in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("answer_format", ["auto", "letter"])
def test_options_vote_by_their_letters(tmp_path: Path, answer_format: Any) -> None:
    texts = ("B. 9 apples", "C. 12 pears", "C) none", "**C.** all")
    rows = [{"prompt": "?", "completion": text, "answer": "C"} for text in texts]
    found = score_file(write(tmp_path / "a.jsonl", *rows), [AccuracyReward(answer_format=answer_format)])
    assert values(found) == {"avg_at_4": 0.75, "pass_at_1": 0.75, "pass_at_4": 1.0, "maj_at_4": 1.0} | {
        "reward/accuracy": 0.75
    }


@pytest.mark.parametrize("answer_format", ["auto", "letter"])
def test_multiple_choice_by_subject(shared_data: Path, tmp_path: Path, answer_format: Any) -> None:
    """Right letters for even rows, the next letter for odd ones, in the wordings that models use."""
    data = shared_data / "mmlu_stem_500.jsonl"
    raw = [json.loads(line) for line in data.read_text().splitlines()]
    wordings = ("The answer is ({}).", "**{}**", "{}. since it is", r"so \boxed{{{}}}", "A is wrong.\nAnswer: {}")
    rows = []
    for index, (row, loaded) in enumerate(zip(raw, load_rows(DataSource(preset="mmlu", path=str(data))), strict=True)):
        letter = "ABCD"[(row["answer"] + index % 2) % 4]
        text = wordings[0 if index % 5 == 2 else index % 5].format(letter)
        rows.append({"prompt_id": index, "prompt": f"Q: {loaded['prompt']}", "completion": text})
        assert (loaded["subject"], loaded["type"]) == (row["type"], row["type"])
    file = write(tmp_path / "mmlu.jsonl", *rows)
    main(["score", str(file), "--preset", "mmlu", "--path", str(data), "--format", answer_format])
    found = json.loads((tmp_path / "mmlu.results.json").read_text())
    assert values(found)["pass_at_1"] == 0.5
    counts = Counter(row["type"] for row in raw)
    right = Counter(row["type"] for row in raw[::2])
    assert {name: some["prompts"] for name, some in found["subjects"].items()} == dict(counts)
    for name, some in found["subjects"].items():
        assert values(some)["pass_at_1"] == pytest.approx(right[name] / counts[name]), name
