"""Symbolic comparison of answers by math-verify, in worker processes that can be killed."""

import json
import math
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_WORKER = Path(__file__).with_name("_verifier_worker.py")
_START_SECONDS = 120.0  # importing math-verify takes about a second; a loaded machine may take much longer
_MAX_CHARACTERS = 10_000


class MathVerifier:
    r"""Decide with math-verify whether answers are equivalent, one killable process per worker.

    math-verify can hang without end on model output (``9^{9^{9^{9}}}``), and its own timeout needs the main thread.
    Here a worker that overruns its deadline is killed and replaced. Workers start when first needed; they are
    stopped by :meth:`close`, by the end of a ``with`` block, with the object, and at the end of the program. Copies
    and forked children start workers of their own.

    Args:
        workers: number of processes that compare at the same time.
        deadline: seconds one comparison may take; starting a process does not count.
        memory_limit_mb: bound on the address space of a worker, where the platform supports it.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> with MathVerifier() as verifier:
        ...     verifier.verify([(r"\sqrt{8}", r"2\sqrt{2}"), ("x + 1", "x + 2")])
        [True, False]
    """

    def __init__(self, workers: int = 1, deadline: float = 5.0, memory_limit_mb: int = 2048) -> None:
        if workers < 1:
            raise ValueError(f"`workers` must be at least 1, got {workers}.")
        if not 0 < deadline < math.inf:
            raise ValueError(f"`deadline` must be a finite number of seconds above 0, got {deadline}.")
        if memory_limit_mb < 256:
            raise ValueError(f"`memory_limit_mb` must be at least 256, got {memory_limit_mb}; math-verify needs that.")
        self.workers = workers
        self.deadline = deadline
        self.memory_limit_mb = memory_limit_mb
        self._pool: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop, self._pool)

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Compare pairs of a gold answer and an answer.

        Args:
            pairs: gold answer and answer of each row, LaTeX or plain.

        Returns:
            For each row True or False, or None where the comparison failed, overran its deadline, or a text has more
            than 10,000 characters.

        Raises:
            RuntimeError: a worker cannot start.
        """
        verdicts: list[bool | None] = [None] * len(pairs)
        waiting = deque(row for row, pair in enumerate(pairs) if max(map(len, pair)) <= _MAX_CHARACTERS)
        if self._pool and self._pool[0].owner != os.getpid():
            _stop(self._pool)  # inherited through a fork: they belong to the parent
        try:
            while waiting or any(worker.row is not None for worker in self._pool):
                self._assign(pairs, waiting)
                for worker in self._wait():
                    message = worker.receive()
                    if worker.starting:
                        worker.started(message)
                        continue
                    if worker.row is not None and message is not None:
                        verdicts[worker.row] = message["equal"]
                    worker.row = None
                    if message is None:
                        self._discard(worker)
        except BaseException:
            # A worker that is left busy would answer this request when asked the next.
            self.close()
            raise
        return verdicts

    def _assign(self, pairs: Sequence[tuple[str, str]], waiting: deque[int]) -> None:
        """Hand rows to idle workers, and start workers while rows outnumber them."""
        for worker in list(self._pool):
            if not worker.starting and worker.row is None and worker.process.poll() is not None:
                self._discard(worker)  # died while idle: no row is to blame
            elif not worker.starting and worker.row is None and waiting:
                worker.send(waiting.popleft(), pairs, self.deadline)
        starting = sum(worker.starting for worker in self._pool)
        while len(self._pool) < self.workers and starting < len(waiting):
            self._pool.append(_Worker(self.deadline, self.memory_limit_mb))
            starting += 1

    def _wait(self) -> list["_Worker"]:
        """The workers that have said something, died, or overrun their deadline."""
        active = [worker for worker in self._pool if worker.starting or worker.row is not None]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.output, selectors.EVENT_READ, worker)
            nearest = min((worker.due for worker in active), default=0.0)
            ready = [key.data for key, _ in selector.select(max(0.0, nearest - time.monotonic()))]
        return ready or [worker for worker in active if worker.due <= time.monotonic()]

    def _discard(self, worker: "_Worker") -> None:
        worker.stop()
        self._pool.remove(worker)

    def close(self) -> None:
        """Stop all workers; the next :meth:`verify` starts new ones."""
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
    """One process, its pipes, and the row that it works on."""

    def __init__(self, deadline: float, memory_limit_mb: int) -> None:
        self.process = subprocess.Popen(  # noqa: S603 -- our own program, no shell
            [sys.executable, "-P", "-W", "ignore", str(_WORKER), str(deadline), str(memory_limit_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("The math-verify worker has no pipes.")
        self.input, self.output = self.process.stdin, self.process.stdout
        self.owner = os.getpid()
        self.starting = True
        self.row: int | None = None
        self.due = time.monotonic() + _START_SECONDS
        self._received = b""

    def send(self, row: int, pairs: Sequence[tuple[str, str]], deadline: float) -> None:
        """Start on a row. JSON in ASCII carries null bytes and lone surrogates too."""
        gold, answer = pairs[row]
        request = memoryview(json.dumps({"gold": gold, "answer": answer}).encode("ascii") + b"\n")
        self.row = row
        self.due = time.monotonic() + deadline
        try:
            while request:
                request = request[self.input.write(request) or 0 :]
        except BrokenPipeError:
            pass  # it died; reading says so

    def receive(self) -> dict[str, Any] | None:
        """The next message; None where there will be none (dead or overdue). An incomplete line is waited for."""
        while b"\n" not in self._received:
            with selectors.DefaultSelector() as selector:
                selector.register(self.output, selectors.EVENT_READ)
                if not selector.select(max(0.0, self.due - time.monotonic())):
                    return None
            chunk = os.read(self.output.fileno(), 65536)
            if not chunk:
                return None
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def started(self, message: dict[str, Any] | None) -> None:
        """Check the first message."""
        if message is None or "error" in message:
            reason = "it died or hung while starting" if message is None else message["error"]
            raise RuntimeError(f"A math-verify worker cannot start: {reason}. Is `math-verify` installed?")
        self.starting = False

    def stop(self) -> None:
        """Kill and reap the process; a process that belongs to a parent is only let go of."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        else:
            self.process.returncode = 0  # not ours to wait for
        self.input.close()
        self.output.close()


def _stop(pool: list[_Worker]) -> None:
    while pool:
        pool.pop().stop()
