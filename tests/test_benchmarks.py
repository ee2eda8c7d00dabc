"""The benchmarks run and measure what they say; how fast anything is, no test asserts."""

import argparse
import json
from pathlib import Path
from typing import Any

import bench_advantage
import bench_decode
import bench_learn
import bench_ranks
import bench_scaling
import bench_step
import gpu_check
import measuring
import pytest
import torch
from small import json_lines

BUILTIN = "builtin:arithmetic"
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")  # a benchmark has no validation data


@pytest.mark.parametrize("off", [{}, *bench_step.OPTIMISATIONS.values()])
def test_a_step_of_ours_is_measured_with_every_switch(off: dict[str, Any]) -> None:
    case = {"max_new_tokens": 12, "threads": torch.get_num_threads(), "prompts": 2, "group": 4, "off": off}
    found = bench_step.measure_ours(BUILTIN, None, case)
    assert found["step_s"] > found["generation_s"] > 0
    assert 8 < found["tokens"] <= 2 * 4 * 12


def test_the_learning_pass_is_measured() -> None:
    found = bench_learn.measure(BUILTIN, None, {"length": 6, "prompts": [5, 9], "off": {}})
    assert found["tokens_per_needed"] == 1
    assert found["gflops"] > 0
    padded = {"share_prompts_in_learning": False}
    assert bench_learn.measure(BUILTIN, None, {"length": 6, "prompts": [5, 9], "off": padded})["tokens_per_needed"] > 2


@pytest.mark.parametrize("side", ["grouped", "generate"])
def test_decoding_is_measured(side: str) -> None:
    found = bench_decode.measure(BUILTIN, None, {"side": side, "cases": [[2, 3, 5, 6], [1, 2, 4, 5]]})
    assert found["seconds 1"] > 0
    assert 0 < found["roofline_onednn_ms 0"] <= found["roofline_ms 0"]


def test_the_decoders_switches_are_measured() -> None:
    found = bench_decode.measure_switches(BUILTIN, None)
    assert all(found[f"seconds {index}"] > 0 for index in range(len(bench_decode.SWITCHES)))
    assert found["rows 0"] == 0


@pytest.mark.slow
def test_flips_between_numbers_of_ranks_are_counted() -> None:
    found = bench_ranks.flips(BUILTIN, "float64", 4, 1)
    assert (found["rows"], found["other tokens"]) == (32, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_check_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    code = gpu_check.main(["--tiny", f"--output={tmp_path}"])
    found = json_lines(tmp_path / "report.jsonl")
    assert not [line for line in found if "FAILED" in line]
    assert code == 0
    assert {line["check"] for line in found if "seconds" in line} >= set(gpu_check.CHECKS)
    parity = [line for line in found if "rows_with_other_tokens" in line]
    assert len(parity) == 6
    assert all(line["rows_with_other_tokens"] == line["gradient_relative_error"] == 0 for line in parity)
    repeats = [line for line in found if "same_bits_resumed" in line]
    assert len(repeats) == 2
    assert all(line["same_bits_again"] and line["same_bits_resumed"] for line in repeats)


def test_the_advantage_is_measured() -> None:
    found = bench_advantage.measure(None, None, {"size": 4})
    assert 0 < found["advantage_ms"] < found["step_ms"]


def test_exponents_are_slopes_in_logarithms() -> None:
    assert bench_scaling.exponent([1, 2, 4], [3.0, 3.0 * 2**1.5, 3.0 * 4**1.5]) == pytest.approx(1.5)
    assert bench_scaling.exponent([1, 3, 10], [5.0, 5.0, 5.0]) == pytest.approx(0)


def test_cases_are_measured_in_turn_and_medians_taken(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "case = json.loads(next(a for a in sys.argv if a.startswith('--measure=')).removeprefix('--measure='))\n"
        f"with open({str(log)!r}, 'a') as file: file.write(case['name'])\n"
        f"print('noise'); print(json.dumps({{'value': len(open({str(log)!r}).read()), 'name': case['name']}}))\n"
    )
    arguments = argparse.Namespace(threads=1, model=None, prompts=None, repeats=3)
    found = measuring.in_turn(str(script), [{"name": "a"}, {"name": "b"}], arguments)
    assert log.read_text() == "ababab"
    assert found == [{"value": 3, "name": "a"}, {"value": 4, "name": "b"}]


def test_a_report_is_a_table_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    arguments = argparse.Namespace(threads=2, json=path, repeats=3)
    measuring.report("Title", [{"name": "ours", "seconds": 1.23456}, {"name": "theirs"}], {"ratio": 3.5}, arguments)
    printed = capsys.readouterr().out
    assert "threads 2" in printed
    assert "1.23" in printed
    assert "ratio: 3.5" in printed
    written = json.loads(path.read_text())
    assert written["ratio"] == 3.5
    assert written["machine"]["versions"]["torch"]
    assert written["rows"][1] == {"name": "theirs"}


def test_prompts_come_from_a_file_or_are_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "1?"}\n{"question": "2?"}\n')
    assert measuring.problems(path, 3) == ["1?", "2?", "1?"]
    monkeypatch.setenv("LAMBDAPO_TEST_DATA", str(tmp_path))
    built_in = measuring.problems(None, 5)
    assert len(set(built_in)) == 4
    assert built_in[4] == built_in[0]
