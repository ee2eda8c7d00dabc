"""What math-verify says, and how the worker processes come and go; faults are in ``test_pool_faults.py``."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_lambdapo.rewards.verifier import pool as verifier_module
from lightning_lambdapo.rewards.verifier.pool import MathVerifier, Verdict

EQUAL, DIFFERENT, FAILED, TIMEOUT, _ = Verdict

TOWER = "9^{9^{9^{9}}}"
ROOT = str(Path(__file__).parents[3])


def pids(verifier: MathVerifier) -> list[int]:
    return [worker.process.pid for worker in verifier._pool]


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(deadline=60.0) as shared:
        yield shared


def test_verdicts_come_back_in_order(verifier: MathVerifier) -> None:
    pairs = [("1", str(n % 2)) for n in range(9)]
    assert verifier.verify(pairs) == [EQUAL if n % 2 else DIFFERENT for n in range(9)]
    assert verifier.verify([]) == []


def test_nothing_starts_before_it_is_needed_and_the_worker_is_kept() -> None:
    with MathVerifier(deadline=60.0) as lazy:
        assert pids(lazy) == []
        lazy.verify([("1", "1")])
        first = pids(lazy)
        lazy.verify([("1", "1")])
        assert pids(lazy) == first
        assert len(first) == 1


def test_several_workers_share_the_rows() -> None:
    with MathVerifier(workers=2, deadline=1.0) as verifier:
        assert verifier.verify([("3", TOWER), *[("1/2", "0.5")] * 6, ("1", "2")]) == [TIMEOUT, *[EQUAL] * 6, DIFFERENT]
        assert len(pids(verifier)) <= 2


@pytest.mark.parametrize(
    "text",
    ["", "\x00", "\ud800", "\U0001f600" * 300, "\n" * 50, "$" * 99, "{" * 200, "\\" * 99, "}" * 99,
     '"}\n{"equal": true}\n', "\\boxed{", "\\text{\u202e}", "__import__('os').system('true')", "x" * 1_000,
     r"\frac{" * 10 + "1" + "}{2}" * 10, r"\sqrt{" * 60 + "2" + "}" * 60, r"\sqrt{" * 500, "\U0001f600" * 10_000],
)  # fmt: skip
def test_hostile_strings_do_not_break_the_protocol(verifier: MathVerifier, text: str) -> None:
    assert verifier.verify([("17", text), ("1/2", "0.5")])[0] in (DIFFERENT, FAILED)
    assert verifier.verify([(text, "17"), ("1/2", "0.5")])[1] is EQUAL


def test_a_megabyte_is_failed_unsent(verifier: MathVerifier) -> None:
    assert verifier.verify([("1", "1" * 2**20), ("1" * 2**20, "1"), ("1", "1")]) == [FAILED, FAILED, EQUAL]


def test_it_works_off_the_main_thread(verifier: MathVerifier) -> None:
    verdicts: list[list[Verdict]] = []
    thread = threading.Thread(
        target=lambda: verdicts.append(verifier.verify([(r"\sqrt{8}", r"2\sqrt{2}"), ("1", "2")]))
    )
    thread.start()
    thread.join()
    assert verdicts == [[EQUAL, DIFFERENT]]


def test_an_interrupted_call_leaves_no_stale_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with MathVerifier(deadline=60.0) as verifier:
        verifier.verify([("1", "1")])
        wait = verifier_module._wait

        def interrupt_the_second_row(workers: Any, *arguments: Any) -> Any:
            if isinstance(workers, dict) and 1 in workers.values():
                raise KeyboardInterrupt
            return wait(workers, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(verifier_module, "_wait", interrupt_the_second_row)
            with pytest.raises(KeyboardInterrupt):
                verifier.verify([("1", "1"), ("1", "1")])
        assert verifier._pool == []
        assert verifier.verify([("1", "2")]) == [DIFFERENT]


def test_copies_and_pickles_start_their_own_workers(verifier: MathVerifier) -> None:
    verifier.verify([("1", "1")])
    for twin in (copy.deepcopy(verifier), pickle.loads(pickle.dumps(verifier))):  # noqa: S301
        assert (twin.workers, twin.deadline, twin.memory_limit_mb) == (1, 60.0, 2048)
        assert twin.verify([("1", "1")]) == [EQUAL]
        assert pids(twin) != pids(verifier)
        twin.close()
    assert verifier.verify([("1", "1")]) == [EQUAL]


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
        from lightning_lambdapo.rewards import MathVerifier
        verifier = MathVerifier(deadline=60.0)
        verifier.verify([("1", "1")])
        mine = verifier._pool[0].process.pid
        child = os.fork()
        if child == 0:
            good = verifier.verify([("1", "2"), ("1", "1")]) == ["different", "equal"]
            sys.exit(0 if good and verifier._pool[0].process.pid != mine else 1)  # runs the exit handlers too
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert verifier.verify([("1", "1")]) == ["equal"] and verifier._pool[0].process.pid == mine
        print("good")
        """
    )
    assert (result.returncode, result.stdout.strip()) == (0, "good"), result.stderr


def test_the_training_process_never_imports_sympy() -> None:
    result = run(
        """
        import sys
        from lightning_lambdapo.rewards import MathVerifier
        import lightning_lambdapo.rewards
        with MathVerifier(deadline=60.0) as verifier:
            assert verifier.verify([("1/2", "0.5")]) == ["equal"]
        assert not {"sympy", "math_verify", "latex2sympy2_extended"} & set(sys.modules)
        print("good")
        """
    )
    assert result.stdout.strip() == "good", result.stderr


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    for program, reason in [
        ('print(\'{"error": "ImportError: no such thing"}\')', "no such thing"),
        ("", "it died while starting"),
        ("import time; time.sleep(100)", "it was not ready after 0.5 seconds"),
    ]:
        worker.write_text(program)
        monkeypatch.setattr("lightning_lambdapo.rewards.verifier.pool._WORKER", worker)
        monkeypatch.setattr(
            "lightning_lambdapo.rewards.verifier.pool._START_SECONDS", 0.5 if "sleep" in program else 120.0
        )
        with pytest.raises(RuntimeError, match=f"cannot start: .*{reason}"):
            MathVerifier().verify([("1", "1")])


def test_bad_settings_are_errors() -> None:
    with pytest.raises(ValueError, match="`workers` must be at least 1, got 0"):
        MathVerifier(workers=0)
    for deadline in (float("inf"), float("nan"), 0.0):
        with pytest.raises(ValueError, match=f"`deadline` must be from 0.001 to 86400 seconds, got {deadline}"):
            MathVerifier(deadline=deadline)
    with pytest.raises(ValueError, match="`memory_limit_mb` must be at least 256, got 16"):
        MathVerifier(memory_limit_mb=16)
