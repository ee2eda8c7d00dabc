"""Comparisons that spin, sleep, die or are killed: true verdicts for the others, in time, and nothing is left behind.

Most tests run the real worker program with a comparison that misbehaves on request.
"""

import os
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

from lightning_lambdapo.rewards.verifier import pool as verifier_module
from lightning_lambdapo.rewards.verifier.pool import MathVerifier, Verdict

EQUAL, DIFFERENT, FAILED, TIMEOUT, UNDECIDED = Verdict
ROOT = Path(__file__).parents[3]
PROGRAM = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT / "lightning_lambdapo" / "rewards" / "verifier")!r})
from worker import main

def equal(gold, answer):
    deed, _, detail = answer.partition(" ")
    if deed == "spin":
        while True:
            pass
    if deed == "spin-in-c":
        sum(range(10**15))
    if deed == "nap":
        time.sleep(float(detail))
        return True
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "die-once":
        if not os.path.exists(detail):
            os.mkdir(detail)
            os.kill(os.getpid(), signal.SIGKILL)
        return True
    if deed == "kill-supervisor":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    if deed == "fill-memory":
        bytearray(3 * 2**30)
    if deed == "write":
        with open(detail, "wb", buffering=0) as file:
            file.write(b"x")
    if deed == "open-many":
        kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(64)]
    if deed == "raise":
        raise KeyboardInterrupt
    return gold == answer

main(float(sys.argv[1]), int(sys.argv[2]), lambda: equal)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(verifier_module, "_WORKER", path)
    return path


@pytest.fixture
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(deadline=30.0) as one:
        assert one.verify([("a", "a")]) == [EQUAL]
        yield one


def supervisors(verifier: MathVerifier) -> list[int]:
    return [worker.process.pid for worker in verifier._pool]


def living() -> dict[int, int]:
    """Process group of every process that is not a zombie."""
    groups = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            groups[int(path.parent.name)] = int(process_group)
    return groups


def group(leader: int) -> set[int]:
    """Living processes of a worker."""
    return {pid for pid, process_group in living().items() if process_group == leader}


def children(leader: int) -> set[int]:
    return group(leader) - {leader}


def eventually_gone(leader: int, seconds: float = 20.0) -> bool:
    """Whether a worker ends. A killed child is there until the kernel has freed its memory."""
    end = time.monotonic() + seconds
    while group(leader):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def kill(victims: set[int], blow: signal.Signals = signal.SIGKILL) -> None:
    for victim in victims:
        os.kill(victim, blow)
    while victims & living().keys():
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_spinning_row_times_out_alone(workers: int) -> None:
    rows = [("a", "spin"), ("a", "a"), ("a", "b"), ("b", "spin-in-c"), ("c", "c")]
    with MathVerifier(workers=workers, deadline=0.5) as verifier:
        verifier.verify([("a", "a")] * 2)
        before = supervisors(verifier)
        assert verifier.verify(rows) == [TIMEOUT, EQUAL, DIFFERENT, TIMEOUT, EQUAL]
        assert verifier.verify([("a", "a"), ("a", "b")]) == [EQUAL, DIFFERENT]
        assert supervisors(verifier) == before  # no import had to be repeated


def test_waiting_for_a_busy_machine_is_no_use_of_the_deadline() -> None:
    with MathVerifier(deadline=0.2) as verifier:
        assert verifier.verify([("a", "nap 1.0"), ("a", "a")]) == [EQUAL, EQUAL]


def test_the_deadline_is_each_rows_own() -> None:
    with MathVerifier(deadline=0.5) as verifier:
        work = [("a", "spin-in-c"), *[("a", "a")] * 50, ("a", "spin"), ("a", "a")]
        assert verifier.verify(work) == [TIMEOUT, *[EQUAL] * 50, TIMEOUT, EQUAL]


def test_a_blocked_timer_signal_is_not_inherited() -> None:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        with MathVerifier(deadline=0.2) as verifier:
            assert verifier.verify([("a", "spin"), ("a", "a")]) == [TIMEOUT, EQUAL]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@pytest.mark.parametrize(
    ("workers", "verdicts"),
    [(1, [EQUAL, UNDECIDED, UNDECIDED, UNDECIDED]), (2, [EQUAL, UNDECIDED, EQUAL, DIFFERENT])],
)
def test_a_batch_ends_in_time_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, workers: int, verdicts: list[Verdict]
) -> None:
    monkeypatch.setattr(verifier_module, "_SPARE_SECONDS", 3.0)
    waits: list[tuple[float, float]] = []
    judge = MathVerifier._judge

    def judge_in_time(self: MathVerifier, pairs: Any, waiting: Any, found: Any, until: float) -> None:
        waits.append((until, time.monotonic()))
        judge(self, pairs, waiting, found, until)

    monkeypatch.setattr(MathVerifier, "_judge", judge_in_time)
    with MathVerifier(workers=workers, deadline=0.2) as verifier:
        verifier.verify([("a", "a")] * 2)
        before = supervisors(verifier)
        bound = -(-4 // workers) * 0.2 + 3.0
        start = time.monotonic()
        assert verifier.verify([("a", "a"), ("a", "nap 1000"), ("b", "b"), ("b", "c")]) == verdicts
        assert time.monotonic() >= waits[-1][0]
        assert start + bound <= waits[-1][0] <= waits[-1][1] + bound
        assert len(supervisors(verifier)) == workers - 1
        assert all(eventually_gone(leader) for leader in set(before) - set(supervisors(verifier)))
        assert verifier.verify([("a", "a"), ("a", "b")]) == [EQUAL, DIFFERENT]


def test_a_worker_that_was_stopped_cannot_stop_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier_module, "_SPARE_SECONDS", 0.5)
    with MathVerifier(deadline=0.2) as verifier:
        verifier.verify([("a", "a")])
        os.kill(supervisors(verifier)[0], signal.SIGSTOP)
        assert verifier.verify([("a", "\U0001f600" * 10_000)]) == [UNDECIDED]  # more than a pipe holds
        assert verifier.verify([("a", "a")]) == [EQUAL]


@pytest.mark.parametrize("bomb", ["(10^9)!", r"\frac{" * 39 + "1" + "}{2}" * 39])
def test_a_batch_of_nothing_but_bombs_gets_all_its_verdicts(monkeypatch: pytest.MonkeyPatch, bomb: str) -> None:
    monkeypatch.undo()  # the real program: starting it again for every row would take too long
    monkeypatch.setattr(verifier_module, "_SPARE_SECONDS", 60.0)  # on a busy machine
    with MathVerifier(workers=2, deadline=0.05) as verifier:
        verifier.verify([("1", "1")] * 2)
        before = supervisors(verifier)
        assert verifier.verify([("3", bomb)] * 40) == [TIMEOUT] * 40
        assert supervisors(verifier) == before


def test_a_child_killed_while_idle_costs_nothing(verifier: MathVerifier, tmp_path: Path) -> None:
    before = supervisors(verifier)
    kill(children(before[0]))
    # If the first death counted for the row, its own would be the second.
    assert verifier.verify([("a", f"die-once {tmp_path / 'mark'}"), ("a", "b")]) == [EQUAL, DIFFERENT]
    assert supervisors(verifier) == before


def test_a_row_that_dies_is_repeated_once(verifier: MathVerifier, tmp_path: Path) -> None:
    rows = [("a", f"die-once {tmp_path / 'mark'}"), ("a", "b"), ("a", "die"), ("a", "a")]
    assert verifier.verify(rows) == [EQUAL, DIFFERENT, FAILED, EQUAL]
    assert verifier.verify([("a", "a"), ("a", "b")]) == [EQUAL, DIFFERENT]


@pytest.mark.parametrize("whom", ["child", "supervisor"])
def test_what_is_killed_at_work_is_repeated(verifier: MathVerifier, whom: str) -> None:
    leader = supervisors(verifier)[0]
    victims = children(leader) if whom == "child" else {leader}
    killer = threading.Timer(0.3, kill, [victims])
    killer.start()
    assert verifier.verify([("a", "nap 1.0"), ("a", "b")]) == [EQUAL, DIFFERENT]
    killer.join()
    assert (supervisors(verifier) == [leader]) == (whom == "child")
    assert whom == "child" or eventually_gone(leader)
    assert verifier.verify([("a", "a"), ("a", "b")]) == [EQUAL, DIFFERENT]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_a_supervisor_killed_while_idle_costs_nothing(
    verifier: MathVerifier, tmp_path: Path, blow: signal.Signals
) -> None:
    leader = supervisors(verifier)[0]
    kill({leader}, blow)
    assert verifier.verify([("a", f"die-once {tmp_path / 'mark'}"), ("a", "b")]) == [EQUAL, DIFFERENT]
    assert supervisors(verifier) != [leader]
    assert eventually_gone(leader)


def test_a_row_that_kills_every_supervisor_fails_alone() -> None:
    with MathVerifier(workers=2, deadline=1.0) as verifier:
        rows = [("a", "a"), ("a", "kill-supervisor"), ("a", "b"), ("c", "c")]
        assert verifier.verify(rows) == [EQUAL, FAILED, DIFFERENT, EQUAL]
        assert verifier.verify([("a", "a"), ("a", "b")]) == [EQUAL, DIFFERENT]


def test_what_a_comparison_may_not_do_fails(verifier: MathVerifier, tmp_path: Path) -> None:
    rows = [("a", "fill-memory"), ("a", "raise"), ("a", f"write {tmp_path / 'file'}"), ("a", "open-many"), ("a", "a")]
    assert verifier.verify(rows) == [FAILED] * 4 + [EQUAL]
    assert (tmp_path / "file").read_bytes() == b""


def test_a_child_that_ran_out_of_memory_serves_no_longer(verifier: MathVerifier) -> None:
    leader = supervisors(verifier)[0]
    before = children(leader)
    assert verifier.verify([("a", "raise"), ("a", "a")]) == [FAILED, EQUAL]
    assert children(leader) == before
    assert verifier.verify([("a", "fill-memory"), ("a", "a")]) == [FAILED, EQUAL]
    assert len(children(leader) - before) == 1


@pytest.mark.parametrize("real", [True, False])
def test_resources_are_bounded(monkeypatch: pytest.MonkeyPatch, real: bool) -> None:
    if real:
        monkeypatch.undo()
    with MathVerifier(deadline=30.0, memory_limit_mb=768) as verifier:
        verifier.verify([("1", "1")])
        members = group(supervisors(verifier)[0])
        assert len(members) == 2
        for member in members:
            lines = Path(f"/proc/{member}/limits").read_text().splitlines()
            limits = {line[:25].strip(): line[25:].split()[:2] for line in lines}
            assert limits["Max address space"] == [str(768 * 2**20)] * 2
            assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
            assert limits["Max open files"] == ["64", "64"]


def test_close_leaves_no_process_and_allows_another_start() -> None:
    verifier = MathVerifier(workers=2, deadline=30.0)
    verifier.verify([("a", "a")] * 4)
    started = supervisors(verifier)
    assert [len(group(leader)) for leader in started] == [2, 2]
    verifier._pool[0].send(("a", "nap 1000"), time.monotonic() + 9.0)
    verifier.close()
    assert all(eventually_gone(leader) for leader in started)
    assert verifier.verify([("a", "a")]) == [EQUAL]
    again = supervisors(verifier)[0]
    del verifier  # the object's end is the workers'
    assert eventually_gone(again)


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        "raise SystemExit(3)",
        "os.kill(os.getpid(), 9)",
        "ask('spin'); os.kill(os.getpid(), 9)",
        "ask('nap 1000'); os.kill(os.getpid(), 9)",
        "ask('spin-in-c'); os.kill(leader, 9); os.kill(os.getpid(), 9)",
    ],
)
def test_no_process_outlives_the_program(program: Path, ending: str) -> None:
    source = f"""
        import os, pathlib, time
        from lightning_lambdapo.rewards.verifier import pool as verifier_module
        verifier_module._WORKER = pathlib.Path({str(program)!r})
        verifier = verifier_module.MathVerifier(deadline=1.0)
        verifier.verify([("a", "a")])
        leader = verifier._pool[0].process.pid
        print(leader, flush=True)
        def ask(answer):
            verifier._pool[0].send(("a", answer), time.monotonic() + 9.0)
            time.sleep(0.3)
        {ending}
        """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert eventually_gone(int(result.stdout)), result.stderr
