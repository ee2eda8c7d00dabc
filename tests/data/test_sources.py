import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lambdapo.data import PRESETS, DataSource, load_rows
from lightning_lambdapo.data.sources import arithmetic_rows
from lightning_lambdapo.rewards.verifier.extraction import marked_answer


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_jsonl_keeps_every_column(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1", "answer": 2.0, "level": 3}, {"prompt": "x?", "answer": "y", "reference": "x so y"}]
    path = write(tmp_path / "rows.jsonl", *rows, "", "")
    first, second = load_rows(DataSource(path=path))
    assert first == {"prompt": "1+1", "answer": "2", "reference": None, "prompt_id": 0, "level": 3}
    assert second == {"prompt": "x?", "answer": "y", "reference": "x so y", "prompt_id": 1}


def test_columns_are_mapped_and_limits_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *({"q": f"{i}?", "prompt_id": 99} for i in range(5)))
    rows = load_rows(DataSource(path=path, columns={"prompt": "q"}, limit=3))
    assert [(row["prompt"], row["prompt_id"], row["answer"]) for row in rows] == [
        ("0?", 0, None),
        ("1?", 1, None),
        ("2?", 2, None),
    ]


def test_columns_that_are_not_mapped_keep_their_names(tmp_path: Path) -> None:
    line = {"q": "1+1?", "answer": "2", "reference": "1+1=2", "prompt": "say"}
    (row,) = load_rows(DataSource(path=write(tmp_path / "rows.jsonl", line), columns={"prompt": "q"}))
    assert (row["prompt"], row["answer"], row["reference"]) == ("1+1?", "2", "1+1=2")
    # A column that is mapped is not read under its own name too.
    (row,) = load_rows(DataSource(path=write(tmp_path / "rows.jsonl", line), columns={"reference": "answer"}))
    assert (row["prompt"], row["answer"], row["reference"]) == ("say", None, "2")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a"}, '{"prompt": "b"'], r"rows\.jsonl, line 2 is not valid JSON"),
        ([{"prompt": "a"}, "", "[1]"], r"line 3 holds list, not an object"),
        ([{"question": "a"}], r"line 1 has no column 'prompt'\. It has 'question'.*columns"),
        ([{"prompt": " "}], r"line 1 does not fit: the prompt must be a non-empty text"),
        ([{"prompt": 5}], r"the prompt must be a non-empty text or a list of chat messages, got 5"),
        ([{"prompt": "a", "answer": [1]}], r"line 1 does not fit: an answer or reference must be text or a number"),
        ([], r"has no rows"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = write(tmp_path / "rows.jsonl", *lines)
    with pytest.raises(ValueError, match=message):
        load_rows(DataSource(path=path))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 2 is not valid JSON.*utf-8"):
        load_rows(DataSource(path=str(path)))
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_rows(DataSource(path=str(tmp_path / "none.jsonl")))


def test_hub_datasets_by_directory(tmp_path: Path) -> None:
    """A local directory goes the way that a hub id goes."""
    from datasets import Dataset

    (tmp_path / "set").mkdir()
    for split, count in (("train", 4), ("test", 2)):
        rows = [{"problem": f"{split} {i}", "result": i, "topic": "sums"} for i in range(count)]
        Dataset.from_list(rows).to_parquet(tmp_path / "set" / f"{split}.parquet")
    columns = {"prompt": "problem", "answer": "result"}
    rows = load_rows(DataSource(dataset=str(tmp_path / "set"), split="test", columns=columns))
    assert [(row["prompt"], row["answer"], row["topic"]) for row in rows] == [
        ("test 0", "0", "sums"),
        ("test 1", "1", "sums"),
    ]
    with pytest.raises(ValueError, match=r"split train, row 0 has no column 'question'\. It has 'problem', 'result'"):
        load_rows(DataSource(dataset=str(tmp_path / "set"), columns={"prompt": "question"}))
    with pytest.raises(ValueError, match=r"\(split dev\) cannot be loaded"):
        load_rows(DataSource(dataset=str(tmp_path / "set"), split="dev", columns=columns))


def test_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    rows = load_rows(DataSource(task="leg_counting", size=3, seed=5, settings={"max_animals": 4}))
    assert len(rows) == 3
    assert all(row["prompt"] and row["answer"].isdigit() and row["metadata"] for row in rows)
    assert rows == load_rows(DataSource(task="leg_counting", size=3, seed=5, settings={"max_animals": 4}))
    with pytest.raises(ValueError, match="cannot make the task 'no_such_task'"):
        load_rows(DataSource(task="no_such_task"))
    with pytest.raises(ValueError, match="cannot make the task 'leg_counting'"):
        load_rows(DataSource(task="leg_counting", settings={"no_such_setting": 1}))


def test_missing_reasoning_gym_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-lambdapo\[reasoning-gym\]'"):
        load_rows(DataSource(task="leg_counting"))


def test_arithmetic_is_right_and_its_splits_are_disjoint() -> None:
    train, test = arithmetic_rows("train"), arithmetic_rows("test")
    assert len(train) + len(test) == len({row["prompt"] for row in train + test}) == 19**3
    for row in train[:200]:
        a, b, c = map(int, row["prompt"].rstrip("=").split("+"))
        assert row["answer"] == str(a + b + c)
        assert row["reference"] == f"{a}+{b}={a + b},{a + b}+{c}={a + b + c};{a + b + c}"
    assert arithmetic_rows("train", size=5) == train[:5]
    assert arithmetic_rows("train", seed=1) != train
    with pytest.raises(ValueError, match="has 685 sums, fewer than size = 700"):
        arithmetic_rows("test", size=700)
    with pytest.raises(ValueError, match="not 'dev'"):
        load_rows(DataSource(preset="arithmetic", split="dev"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one origin, got none"),
        ({"path": "a", "dataset": "b"}, "got path and dataset"),
        ({"preset": "gsm9k"}, r"Unknown preset 'gsm9k'\. There are arithmetic, gsm8k"),
        ({"task": "a", "preset": "gsm8k"}, "takes no `preset`"),
        ({"preset": "arithmetic", "path": "a"}, "takes no `path`"),
        ({"path": "a", "size": 3}, "`size` = 3 has no effect"),
        ({"path": "a", "settings": {"b": 1}}, "`settings` = .* has no effect"),
        ({"task": "a", "columns": {"prompt": "q"}}, "`columns` = .* has no effect"),
        ({"path": "a", "columns": {"question": "q"}}, "It cannot map question"),
        ({"path": "a", "limit": 0}, "`limit` must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSource(**settings)


def preset(tmp_path: Path, name: str, row: dict[str, Any], **settings: Any) -> dict[str, Any]:
    (found,) = load_rows(DataSource(preset=name, path=write(tmp_path / "rows.jsonl", row), **settings))
    return found


def test_preset_gsm8k(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "2*600 = <<2*600=1200>>1200\nSo 1200.\n#### 1,200"}
    found = preset(tmp_path, "gsm8k", row)
    assert found["prompt"] == "How many?"
    assert found["answer"] == "1200"
    assert found["reference"] == "2*600 = 1200\nSo 1200.\n#### 1,200"
    with pytest.raises(ValueError, match=r"line 1 does not fit the preset gsm8k: .*no final line '#### answer'"):
        preset(tmp_path, "gsm8k", {"question": "How many?", "answer": "3"})


def test_preset_math(tmp_path: Path) -> None:
    solution = r"First \boxed{3}, no: \boxed{\frac{1}{2}}."
    found = preset(tmp_path, "math", {"problem": "p", "solution": solution, "level": "Level 2"})
    assert (found["answer"], found["reference"], found["level"]) == (r"\frac{1}{2}", solution, "Level 2")
    with pytest.raises(ValueError, match=r"has no \\boxed"):
        preset(tmp_path, "math", {"problem": "p", "solution": "3"})


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so the sum is $\boxed 9.$", "9"),
        (r"with probability $\boxed\frac12$.", r"\frac12"),
        (r"is \boxed \frac{3}{4}", r"\frac{3}{4}"),
        (r"First \boxed 3, no: $\boxed 4$", "4"),
        (r"$x = \boxed{3}$ or $x = \boxed{8}$", "3, 8"),
        (r"$k=\boxed{12}$ and $m=\boxed{5}$", "k=12, m=5"),
    ],
)
def test_preset_math_reads_every_box(tmp_path: Path, solution: str, answer: str) -> None:
    assert preset(tmp_path, "math", {"problem": "p", "solution": solution})["answer"] == answer
    messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": f"<think>4?</think> {solution}"}]
    assert preset(tmp_path, "mixture_of_thoughts", {"messages": messages})["answer"] == answer


@pytest.mark.parametrize("name", ["math500", "aime24"])
def test_presets_of_competitions(tmp_path: Path, name: str) -> None:
    found = preset(tmp_path, name, {"problem": "p", "solution": "s", "answer": 70, "subject": "x"})
    assert (found["prompt"], found["answer"], found["reference"], found["subject"]) == ("p", "70", "s", "x")


def test_presets_without_solutions(tmp_path: Path) -> None:
    assert preset(tmp_path, "aime25", {"problem": "p", "answer": "70"})["answer"] == "70"
    assert preset(tmp_path, "amc23", {"question": "p", "answer": 27.0})["answer"] == "27"
    assert preset(tmp_path, "mawps", {"input": "p", "target": 14.0})["answer"] == "14"


@pytest.mark.parametrize("answer", [2, "C", "(C)", "five"])
@pytest.mark.parametrize("name", ["mmlu", "multiple_choice"])
def test_multiple_choice_by_index_letter_or_text(tmp_path: Path, name: str, answer: Any) -> None:
    found = preset(tmp_path, name, {"question": "2+3?", "choices": ["three", "four", "five"], "answer": answer})
    assert found["prompt"] == "2+3?\nA. three\nB. four\nC. five"
    assert found["answer"] == "C"


@pytest.mark.parametrize("answer", [3, "D", "six", None])
def test_multiple_choice_without_a_right_choice(tmp_path: Path, answer: Any) -> None:
    with pytest.raises(ValueError, match="neither an index, a letter nor the text of a choice"):
        preset(tmp_path, "mmlu", {"question": "2+3?", "choices": ["three", "four", "five"], "answer": answer})


@pytest.mark.parametrize("name", [None, "multiple_choice"])
@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        ([1, 2, 3, 4], 2, "B"),  # the value, not the index
        ([1, 2, 3, 4], "2", "B"),
        ([1, 2, 3, 4], 2.0, "B"),
        ([10, 12.5, 14], 12.5, "B"),
        ([10, 12.0, 14], "12", "B"),
        ([10, 12, 14], "(C)", "C"),
        (["1", "2", "3", "4"], "2", "B"),
        (["1", "2", "3", "4"], 2, "C"),  # texts have an index
        (["1", "2", "3", "4"], 2.0, "C"),
        ([" five ", "six"], "five", "A"),
    ],
)
def test_multiple_choice_by_value(
    tmp_path: Path, name: str | None, choices: list[Any], answer: Any, letter: str
) -> None:
    asked = {"question" if name else "prompt": "2+3?", "choices": choices, "answer": answer}
    path = write(tmp_path / "rows.jsonl", asked)
    (found,) = load_rows(DataSource(path=path, preset=name))
    assert found["answer"] == letter
    assert found["prompt"].startswith("2+3?\nA. ")


def test_numbers_that_are_no_choice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"answer 2 is neither .*where choices are numbers, as \[3, 5, 7\] are"):
        preset(tmp_path, "multiple_choice", {"question": "?", "choices": [3, 5, 7], "answer": 2})
    with pytest.raises(ValueError, match="answer 5 is neither an index, a letter nor the text of a choice"):
        preset(tmp_path, "multiple_choice", {"question": "?", "choices": ["3", "5", "7"], "answer": 5})
    # The dataset has indices, whatever its choices look like.
    assert preset(tmp_path, "mmlu", {"question": "?", "choices": [3, 5, 7], "answer": 2})["answer"] == "C"


@pytest.mark.parametrize("choices", [None, [], {"text": [], "label": []}, {"text": None}])
def test_rows_without_choices_are_free_form(tmp_path: Path, choices: Any) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "2+3?", "choices": choices, "answer": 5})
    (found,) = load_rows(DataSource(path=path))
    assert (found["prompt"], found["answer"]) == ("2+3?", "5")
    with pytest.raises(ValueError, match="its choices must be a list of 2 to 10 texts"):
        preset(tmp_path, "multiple_choice", {"question": "2+3?", "choices": choices, "answer": 5})


def test_preset_gpqa_shuffles_the_same_way_every_time(tmp_path: Path) -> None:
    letters = set()
    for number in range(12):
        row = {"Question": f"q{number}?", "Correct Answer": "right\n", "Explanation": "because"}
        row |= {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
        found = preset(tmp_path, "gpqa_diamond", row)
        assert found == preset(tmp_path, "gpqa_diamond", row)
        assert f"\n{found['answer']}. right" in found["prompt"]
        assert found["reference"] == "because"
        letters.add(found["answer"])
    assert len(letters) > 2


@pytest.mark.parametrize(
    ("name", "extra", "subject"),
    [
        ("math", {"type": "Algebra", "level": "Level 2"}, "Algebra"),
        ("math500", {"subject": "Geometry", "level": 3}, "Geometry"),
        ("mmlu", {"subject": "anatomy"}, "anatomy"),
        ("mmlu", {"type": "college_biology"}, "college_biology"),
        ("mmlu", {"subject": "anatomy", "type": "x"}, "anatomy"),
        ("multiple_choice", {"type": "college_biology"}, "college_biology"),
        ("gpqa_diamond", {"High-level domain": "Physics", "Subdomain": "Optics"}, "Physics"),
        ("gsm8k", {}, None),
    ],
)
def test_subjects_of_presets(tmp_path: Path, name: str, extra: dict[str, Any], subject: str | None) -> None:
    row: dict[str, Any] = {
        "problem": "p",
        "solution": r"\boxed{5}",
        "question": "p",
        "choices": ["5", "6"],
        "answer": "#### 5",
    }
    row |= {"Question": "p", "Correct Answer": "5", "Explanation": "e"} | extra
    row |= {f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)} | ({"answer": 0} if name[0] == "m" else {})
    found = preset(tmp_path, name, row)
    assert found.get("subject") == subject
    assert extra.items() <= found.items()  # what there was stays
    first = next(iter(extra), None)
    if first is not None:
        columns = {"subject": list(extra)[-1]}
        assert preset(tmp_path, name, row, columns=columns)["subject"] == list(extra.values())[-1]


def test_subjects_of_files_without_a_preset(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "p", "answer": 3, "topic": "sums", "subject": "x"})
    assert load_rows(DataSource(path=path))[0]["subject"] == "x"
    (row,) = load_rows(DataSource(path=path, columns={"subject": "topic"}))
    assert (row["prompt"], row["answer"], row["subject"], row["topic"]) == ("p", "3", "sums", "sums")
    with pytest.raises(ValueError, match=r"line 1 has no column 'area'"):
        load_rows(DataSource(path=path, columns={"subject": "area"}))


def test_preset_mixture_of_thoughts(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": r"<think>5</think> \boxed{5}"}]
    found = preset(tmp_path, "mixture_of_thoughts", {"messages": messages, "source": "m"})
    assert (found["prompt"], found["answer"], found["reference"]) == ("2+3?", "5", messages[1]["content"])
    with pytest.raises(ValueError, match="no user and assistant turn"):
        preset(tmp_path, "mixture_of_thoughts", {"messages": messages[:1]})


def test_presets_with_a_hub_id_know_where_they_are() -> None:
    for name, found in PRESETS.items():
        assert "prompt" in found.columns, name
        assert (found.dataset is None) == (name in ("multiple_choice", "mawps", "sat_math"))
    with pytest.raises(ValueError, match="has no hub dataset of its own"):
        load_rows(DataSource(preset="mawps"))


def test_real_files(shared_data: Path) -> None:
    train = load_rows(DataSource(preset="gsm8k", path=str(shared_data / "gsm8k_train.jsonl")))
    assert len(train) == 7473
    assert (train[0]["answer"], train[0]["prompt_id"]) == ("72", 0)
    assert not any("<<" in row["reference"] or "," in row["answer"] for row in train)
    assert all(marked_answer(row["reference"], "hash") is not None for row in train)
    for name, file, count in (
        ("mawps", "mawps_singleop.jsonl", 562),
        ("multiple_choice", "mmlu_stem_500.jsonl", 500),
        ("sat_math", "sat_math.jsonl", 32),
    ):
        rows = load_rows(DataSource(preset=name, path=str(shared_data / file)))
        assert len(rows) == count
        assert all(row["answer"] for row in rows)
    assert "A) " in rows[0]["prompt"]
    assert rows[0]["answer"] == "A"
