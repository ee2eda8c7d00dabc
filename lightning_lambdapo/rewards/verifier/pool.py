"""Symbolic comparison of answers by math-verify, in worker processes that can be killed."""

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_WORKER = Path(__file__).with_name("worker.py")
_START_SECONDS = 120.0  # importing math-verify takes about a second, but a loaded machine may take much longer
_SPARE_SECONDS = 5.0  # of wall time, on top of every row's deadline
_LONGEST_WAIT = 1e6  # seconds, because selectors overflow at 2^31 milliseconds
_MAX_CHARACTERS = 10_000
_CANNOT_START = "A math-verify worker cannot start: {}. Is `math-verify` installed?"


class Verdict(StrEnum):
    """The result of one comparison.

    Attributes:
        EQUAL: the answers are equivalent.
        DIFFERENT: they are not.
        FAILED: math-verify raised, ran out of memory or was killed twice, or a text has more than 10,000 characters.
        TIMEOUT: the comparison used up its deadline.
        UNDECIDED: the time for the whole batch ended before it.
    """

    EQUAL = "equal"
    DIFFERENT = "different"
    FAILED = "failed"
    TIMEOUT = "timeout"
    UNDECIDED = "undecided"


class MathVerifier:
    r"""Decide with math-verify whether answers are equivalent, in worker processes that can be killed.

    math-verify can hang forever on model output (``(10^9)!``), and its own timeout needs the main thread. Here a
    comparison is killed when its CPU time reaches the deadline. No other row is affected, and a busy machine does not
    make a right answer wrong. A comparison that something else killed is repeated once. A call ends within
    ``ceil(rows / workers) * deadline + 5`` seconds of wall time once its workers run.

    Workers start when first needed. They stop at :meth:`close`, at the end of a ``with`` block, with the object, and at
    the end of the program. Copies and forked children start their own workers. Where the platform supports it, a worker
    cannot write files or dump core.

    Args:
        workers: number of processes that compare at the same time. With more workers than free cores, rows wait for a
            core and may end undecided.
        deadline: CPU seconds one comparison may take.
        memory_limit_mb: bound on the address space of a worker, where the platform supports it.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> with MathVerifier() as verifier:
        ...     verifier.verify([(r"\sqrt{8}", r"2\sqrt{2}"), ("x + 1", "x + 2")])
        [<Verdict.EQUAL: 'equal'>, <Verdict.DIFFERENT: 'different'>]
    """

    def __init__(self, workers: int = 1, deadline: float = 5.0, memory_limit_mb: int = 2048) -> None:
        if workers < 1:
            raise ValueError(f"`workers` must be at least 1, got {workers}.")
        if not 0.001 <= deadline <= 86_400:
            raise ValueError(f"`deadline` must be from 0.001 to 86400 seconds, got {deadline}.")
        if memory_limit_mb < 256:
            raise ValueError(
                f"`memory_limit_mb` must be at least 256, got {memory_limit_mb}, because math-verify needs that."
            )
        self.workers = workers
        self.deadline = deadline
        self.memory_limit_mb = memory_limit_mb
        self._pool: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop, self._pool)

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Compare pairs of a gold answer and an answer.

        Args:
            pairs: gold answer and answer of each row, LaTeX or plain.

        Returns:
            The verdict on each row.

        Raises:
            RuntimeError: a worker cannot start.
        """
        short = [max(map(len, pair)) <= _MAX_CHARACTERS for pair in pairs]
        verdicts = [Verdict.UNDECIDED if sendable else Verdict.FAILED for sendable in short]
        waiting = deque(row for row, sendable in enumerate(short) if sendable)
        if self._pool and self._pool[0].owner != os.getpid():
            _stop(self._pool)  # inherited through a fork: they belong to the parent
        try:
            self._start_for(waiting)
            until = time.monotonic() + math.ceil(len(waiting) / self.workers) * self.deadline + _SPARE_SECONDS
            with suppress(TimeoutError):
                self._judge(pairs, waiting, verdicts, until)
        except BaseException:
            # A worker that is still busy would answer this request when asked the next.
            self.close()
            raise
        for worker in [worker for worker in self._pool if worker.row is not None or not worker.ready]:
            self._discard(worker)
        return verdicts

    def _start_for(self, waiting: deque[int]) -> None:
        """Start a worker for every row, up to the limit, and replace those that died while idle."""
        for worker in [worker for worker in self._pool if worker.has_output()]:
            self._discard(worker)
        try:
            self._start(len(waiting), time.monotonic() + _START_SECONDS)
        except TimeoutError:
            raise RuntimeError(_CANNOT_START.format(f"it was not ready after {_START_SECONDS:g} seconds")) from None

    def _start(self, count: int, until: float) -> None:
        while len(self._pool) < min(self.workers, count):
            self._pool.append(_Worker(self.deadline, self.memory_limit_mb))
        for worker in self._pool:
            worker.wait_until_ready(until)

    def _judge(
        self, pairs: Sequence[tuple[str, str]], waiting: deque[int], verdicts: list[Verdict], until: float
    ) -> None:
        """Fill in verdicts until no row waits. TimeoutError when the time is over."""
        died: set[int] = set()
        while True:
            for worker in self._pool:
                if worker.row is None and waiting:
                    worker.row = waiting.popleft()
                    worker.send(pairs[worker.row], until)
            busy = {worker: worker.row for worker in self._pool if worker.row is not None}
            if not busy:
                return
            for worker in _wait(busy, until):
                message, row = worker.receive(until), busy.pop(worker)
                worker.row = None
                if message is None:
                    self._discard(worker)
                if message is not None and message["verdict"] != "died":
                    verdicts[row] = Verdict(message["verdict"])
                elif row in died:
                    verdicts[row] = Verdict.FAILED
                else:
                    died.add(row)
                    waiting.appendleft(row)
            self._start(len(busy) + len(waiting), until)

    def _discard(self, worker: "_Worker") -> None:
        worker.stop()
        self._pool.remove(worker)

    def close(self) -> None:
        """Stop all workers. The next :meth:`verify` starts new ones."""
        _stop(self._pool)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"workers": self.workers, "deadline": self.deadline, "memory_limit_mb": self.memory_limit_mb}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Worker:
    """One worker's processes, its pipes, and the row that it works on."""

    def __init__(self, deadline: float, memory_limit_mb: int) -> None:
        self.process = subprocess.Popen(  # noqa: S603 -- our own program, no shell
            [sys.executable, "-P", "-W", "ignore", str(_WORKER), str(deadline), str(memory_limit_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a process group of its own, which is killed as a whole
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("The math-verify worker has no pipes.")
        self.input, self.output = self.process.stdin, self.process.stdout
        os.set_blocking(self.input.fileno(), False)
        self.owner = os.getpid()
        self.ready = False
        self.row: int | None = None
        self._received = b""

    def send(self, pair: tuple[str, str], until: float) -> None:
        """Ask for a comparison. JSON in ASCII carries null bytes and lone surrogates too."""
        request = memoryview(json.dumps({"gold": pair[0], "answer": pair[1]}).encode("ascii") + b"\n")
        try:
            while request:
                _wait([self], until, selectors.EVENT_WRITE)
                request = request[self.input.write(request) or 0 :]
        except BrokenPipeError:
            pass  # it died, as reading will show

    def receive(self, until: float) -> dict[str, Any] | None:
        """The next message. None if the worker has ended. TimeoutError when the time is over."""
        while b"\n" not in self._received:
            _wait([self], until)
            chunk = os.read(self.output.fileno(), 65536)
            if not chunk:
                return None
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def has_output(self) -> bool:
        """Whether there is something to read. For an idle worker, that means that it has ended."""
        with suppress(TimeoutError):
            return bool(_wait([self], 0.0))
        return False

    def wait_until_ready(self, until: float) -> None:
        """Wait for the first message. RuntimeError if there is none or it is an error, TimeoutError if it is late."""
        if self.ready:
            return
        message = self.receive(until)
        if message is None or "error" in message:
            raise RuntimeError(_CANNOT_START.format("it died while starting" if message is None else message["error"]))
        self.ready = True

    def stop(self) -> None:
        """Kill the process with its child and reap it. Of a parent's process, only close the pipes."""
        if self.owner != os.getpid():
            self.process.returncode = 0  # not ours to wait for
        elif self.process.returncode is None:
            # Not reaped yet, so the id of the process group still belongs to it.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.input.close()
        self.output.close()


def _wait(workers: Iterable[_Worker], until: float, event: int = selectors.EVENT_READ) -> list[_Worker]:
    """The workers that can be read from or written to. TimeoutError if none can in time."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.output if event == selectors.EVENT_READ else worker.input, event, worker)
        events = selector.select(min(max(0.0, until - time.monotonic()), _LONGEST_WAIT))
    if not events:
        raise TimeoutError
    return [key.data for key, _ in events]


def _stop(pool: list[_Worker]) -> None:
    while pool:
        pool.pop().stop()
