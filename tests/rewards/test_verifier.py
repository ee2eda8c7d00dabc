"""Worker processes: they answer, they die when they must, and none is left behind."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_lambdapo.rewards import MathVerifier

TOWER = "9^{9^{9^{9}}}"
ROOT = str(Path(__file__).parents[2])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int) -> bool:
    for _ in range(600):
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False


def pids(verifier: MathVerifier) -> list[int]:
    return [worker.process.pid for worker in verifier._pool]


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(deadline=60.0) as shared:
        yield shared


def test_verdicts_come_back_in_order(verifier: MathVerifier) -> None:
    pairs = [("1", str(n % 2)) for n in range(9)]
    assert verifier.verify(pairs) == [bool(n % 2) for n in range(9)]
    assert verifier.verify([]) == []


def test_nothing_starts_before_it_is_needed_and_the_worker_is_kept() -> None:
    with MathVerifier(deadline=60.0) as lazy:
        assert pids(lazy) == []
        lazy.verify([("1", "1")])
        first = pids(lazy)
        lazy.verify([("1", "1")])
        assert pids(lazy) == first
        assert len(first) == 1


def test_a_hanging_row_is_killed_and_the_next_request_answered() -> None:
    with MathVerifier(deadline=3.0) as verifier:
        verifier.verify([("1", "1")])
        stuck = pids(verifier)[0]
        assert verifier.verify([("3", TOWER), ("1/2", "0.5"), (TOWER, "3")]) == [None, True, None]
        assert not alive(stuck)
        assert verifier.verify([(r"\sqrt{8}", r"2\sqrt{2}")]) == [True]


def test_several_workers_share_the_rows() -> None:
    with MathVerifier(workers=2, deadline=5.0) as verifier:
        assert verifier.verify([("3", TOWER), *[("1/2", "0.5")] * 6, ("1", "2")]) == [None, *[True] * 6, False]
        assert len(pids(verifier)) <= 2


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_killed_while_idle_is_replaced_and_no_row_lost(blow: signal.Signals) -> None:
    with MathVerifier(deadline=60.0) as verifier:
        verifier.verify([("1", "1")])
        first = pids(verifier)[0]
        os.kill(first, blow)
        verifier._pool[0].process.wait()
        assert verifier.verify([("1/2", "0.5")]) == [True]
        assert pids(verifier)[0] != first


def test_a_worker_killed_at_work_fails_its_row_alone() -> None:
    with MathVerifier(deadline=60.0) as verifier:
        verifier.verify([("1", "1")])
        killer = threading.Timer(0.5, os.kill, [pids(verifier)[0], signal.SIGKILL])
        killer.start()
        assert verifier.verify([("3", TOWER), ("1/2", "0.5")]) == [None, True]
        killer.join()


@pytest.mark.parametrize(
    "text",
    ["", "\x00", "\ud800", "\U0001f600" * 300, "\n" * 50, "$" * 99, "{" * 200, "\\" * 99, "}" * 99,
     '"}\n{"equal": true}\n', "\\boxed{", "\\text{\u202e}", "__import__('os').system('true')", "x" * 1_000],
)  # fmt: skip
def test_hostile_strings_do_not_break_the_protocol(verifier: MathVerifier, text: str) -> None:
    assert verifier.verify([("17", text), ("1/2", "0.5")])[0] in (False, None)
    assert verifier.verify([(text, "17"), ("1/2", "0.5")])[1] is True


def test_a_megabyte_is_failed_unsent(verifier: MathVerifier) -> None:
    assert verifier.verify([("1", "1" * 2**20), ("1" * 2**20, "1"), ("1", "1")]) == [None, None, True]


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs /proc")
def test_memory_and_processor_time_are_bounded() -> None:
    with MathVerifier(deadline=60.0, memory_limit_mb=768) as verifier:
        verifier.verify([("1", "1")])
        limits = Path(f"/proc/{pids(verifier)[0]}/limits").read_text()
    soft = {line[:25].strip(): line[25:].split()[0] for line in limits.splitlines()}
    assert soft["Max address space"] == str(768 * 2**20)
    assert 120 <= int(soft["Max cpu time"]) <= 240  # twice the deadline, and what importing took


def test_it_works_off_the_main_thread(verifier: MathVerifier) -> None:
    verdicts: list[list[bool | None]] = []
    thread = threading.Thread(
        target=lambda: verdicts.append(verifier.verify([(r"\sqrt{8}", r"2\sqrt{2}"), ("1", "2")]))
    )
    thread.start()
    thread.join()
    assert verdicts == [[True, False]]


def test_an_interrupted_call_leaves_no_stale_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with MathVerifier(deadline=60.0) as verifier:
        verifier.verify([("1", "1")])
        wait = verifier._wait

        def interrupt_the_second_row() -> Any:
            if verifier._pool[0].row == 1:
                raise KeyboardInterrupt
            return wait()

        with monkeypatch.context() as patch:
            patch.setattr(verifier, "_wait", interrupt_the_second_row)
            with pytest.raises(KeyboardInterrupt):
                verifier.verify([("1", "1"), ("1", "1")])
        assert verifier._pool == []
        assert verifier.verify([("1", "2")]) == [False]


def test_close_leaves_no_process_and_allows_another_start() -> None:
    verifier = MathVerifier(workers=2, deadline=60.0)
    verifier.verify([("1", "1")] * 4)
    started = pids(verifier)
    verifier.close()
    assert not any(alive(pid) for pid in started)
    assert verifier.verify([("1", "1")]) == [True]
    again = pids(verifier)[0]
    del verifier  # the object's end is the worker's
    assert not alive(again)


def test_copies_and_pickles_start_their_own_workers(verifier: MathVerifier) -> None:
    verifier.verify([("1", "1")])
    for twin in (copy.deepcopy(verifier), pickle.loads(pickle.dumps(verifier))):  # noqa: S301
        assert (twin.workers, twin.deadline, twin.memory_limit_mb) == (1, 60.0, 2048)
        assert twin.verify([("1", "1")]) == [True]
        assert pids(twin) != pids(verifier)
        twin.close()
    assert verifier.verify([("1", "1")]) == [True]


def run(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )


def test_a_forked_child_starts_its_own_and_spares_its_parents() -> None:
    result = run(
        """
        import os, sys
        from lightning_lambdapo.rewards.verifier import MathVerifier
        verifier = MathVerifier(deadline=60.0)
        verifier.verify([("1", "1")])
        mine = verifier._pool[0].process.pid
        child = os.fork()
        if child == 0:
            good = verifier.verify([("1", "2"), ("1", "1")]) == [False, True] and verifier._pool[0].process.pid != mine
            sys.exit(0 if good else 1)  # runs the exit handlers too
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert verifier.verify([("1", "1")]) == [True] and verifier._pool[0].process.pid == mine
        print("good")
        """
    )
    assert (result.returncode, result.stdout.strip()) == (0, "good"), result.stderr


@pytest.mark.parametrize(
    "ending", ["pass", "raise SystemExit(3)", "os.kill(os.getpid(), 9)", "hang(); os.kill(os.getpid(), 9)"]
)
def test_no_worker_outlives_the_program(ending: str) -> None:
    result = run(
        f"""
        import os, threading, time
        from lightning_lambdapo.rewards.verifier import MathVerifier
        verifier = MathVerifier(deadline=2.0)
        verifier.verify([("1", "1")])
        print(verifier._pool[0].process.pid, flush=True)
        def hang():
            verifier._pool[0].send(0, [("3", "{TOWER}")], 2.0)
            time.sleep(0.5)
        {ending}
        """
    )
    assert wait_until_gone(int(result.stdout))


def test_the_training_process_never_imports_sympy() -> None:
    result = run(
        """
        import sys
        from lightning_lambdapo.rewards.verifier import MathVerifier
        import lightning_lambdapo.rewards
        with MathVerifier(deadline=60.0) as verifier:
            assert verifier.verify([("1/2", "0.5")]) == [True]
        assert not {"sympy", "math_verify", "latex2sympy2_extended"} & set(sys.modules)
        print("good")
        """
    )
    assert result.stdout.strip() == "good", result.stderr


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    for program, reason in [
        ('print(\'{"error": "ImportError: no such thing"}\')', "no such thing"),
        ("", "died or hung"),
    ]:
        worker.write_text(program)
        monkeypatch.setattr("lightning_lambdapo.rewards.verifier._WORKER", worker)
        with pytest.raises(RuntimeError, match=f"cannot start: .*{reason}"):
            MathVerifier().verify([("1", "1")])


def test_bad_settings_are_errors() -> None:
    with pytest.raises(ValueError, match="`workers` must be at least 1, got 0"):
        MathVerifier(workers=0)
    with pytest.raises(ValueError, match="`deadline` must be a finite number of seconds above 0, got inf"):
        MathVerifier(deadline=float("inf"))
    with pytest.raises(ValueError, match="`memory_limit_mb` must be at least 256, got 16"):
        MathVerifier(memory_limit_mb=16)
