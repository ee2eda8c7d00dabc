"""A deadline for code that may hang, such as a user's reward."""

import faulthandler
import io
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_GRACE_SECONDS = 30.0


class DeadlineError(BaseException):
    """Raised where the code hangs. It is no ``Exception``, so that a handler there does not catch it."""


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Interrupt the body after ``seconds`` of wall time. None never interrupts it.

    In the main thread a signal (SIGVTALRM, which hardly anything else uses) interrupts waiting calls too. Code that
    does not return to Python's interpreter cannot be interrupted. After 30 more seconds, the program ends with a
    traceback of all threads. In another thread, and where the platform lacks such signals, only this second limit
    applies.

    Raises:
        DeadlineError: the time is over.
    """
    if seconds is None or seconds == math.inf:
        yield
        return
    try:
        _end_program_after(seconds + _GRACE_SECONDS)
        with _interrupting_after(seconds):
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _interrupting_after(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_kill"):
        yield
        return
    running = True

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if running:
            raise DeadlineError

    before = signal.signal(signal.SIGVTALRM, interrupt)
    caller = threading.get_ident()
    alarm = threading.Timer(seconds, lambda: signal.pthread_kill(caller, signal.SIGVTALRM))
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        running = False
        alarm.cancel()
        alarm.join()  # the signal was sent or never will be, so the handler can be removed
        signal.signal(signal.SIGVTALRM, before)


def _end_program_after(seconds: float) -> None:
    for stream in (sys.stderr, sys.__stderr__):  # notebooks and tests replace these by objects that are no files
        with suppress(io.UnsupportedOperation, AttributeError, ValueError):
            faulthandler.dump_traceback_later(seconds, exit=True, file=stream)  # type: ignore[arg-type]
            return
