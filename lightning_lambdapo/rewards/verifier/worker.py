"""The program of one math-verify worker. :mod:`lightning_lambdapo.rewards.verifier.pool` runs it as a script.

It imports math-verify once and writes ``{"ready": true}``. Then it answers every request, a JSON line ``{"gold": ...,
"answer": ...}``, with a line ``{"verdict": ...}``: ``equal``, ``different``, ``failed``, ``timeout`` or ``died``. A
forked child compares, because replacing it costs only a millisecond. A timer of the child's own CPU time kills it at
the deadline, even inside C code. The first process only passes requests on, reports their results, and ends when its
input ends.

Only LaTeX is parsed, because math-verify's route for plain expressions goes through ``eval``. Its own timeouts
(SIGALRM) are off. Nothing of this package is imported, so that a worker starts fast and does not load torch.
"""

import gc
import json
import logging
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Comparison = Callable[[str, str], bool]

_OUT_OF_MEMORY = 3  # exit code of a child; a fresh one is safer than one that ran out of memory
_CAN_FORK = hasattr(os, "fork") and hasattr(signal, "setitimer")


def load_verifier() -> Comparison:
    """Import math-verify (0.5 to 1 s) and return the comparison of a gold answer with an answer."""
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, FiniteSet, I, MatrixBase  # type: ignore[import-untyped]

    extraction = [LatexExtractionConfig()]

    def read(text: str) -> Any:
        latex = " ".join(text.replace("$", " ").replace("**", "^").split())
        parsed = parse(f"${latex}$", extraction, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
        if not parsed and latex.count(r"\pm") == 1 and "," not in latex:  # such as a sign inside a fraction
            return read(latex.replace(r"\pm", "+") + "," + latex.replace(r"\pm", "-"))
        return parsed

    def same(gold: Any, answer: Any) -> bool:
        return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))

    def complex_number(item: Any) -> Any:
        """The symbol i as the imaginary unit, except in relations: with a real z, "z = i" would become false."""
        terms = item if isinstance(item, FiniteSet) else [item]
        if not all(isinstance(term, Expr | MatrixBase) for term in terms):
            return item
        return item.subs({symbol: I for symbol in item.free_symbols if symbol.name == "i"})

    def equal(gold: str, answer: str) -> bool:
        sides = read(gold), read(answer)
        if same(*sides):
            return True
        with suppress(TypeError, ValueError):  # complex numbers have no order
            complex_sides = [[complex_number(item) for item in side] for side in sides]
            return complex_sides != list(sides) and same(*complex_sides)
        return False

    equal(r"\frac{\sqrt{8}}{2}", r"\sqrt{2}")  # load now what is loaded lazily, for all children
    return equal


def limit(name: str, value: int) -> None:
    """Limit a resource permanently, where the platform can."""
    with suppress(ImportError, AttributeError, OSError, ValueError):
        import resource

        resource.setrlimit(getattr(resource, name), (value, value))


def read_line(source: int) -> bytes:
    """The next line, unbuffered; empty at the end of input. The other side sends one line at a time, and waits."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            chunk = os.read(source, 65536)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            return b""
        line += chunk
    return line


def write_verdict(sink: int, verdict: str) -> None:
    """Answer a request."""
    os.write(sink, json.dumps({"verdict": verdict}).encode("ascii") + b"\n")


def compare(equal: Comparison, gold: str, answer: str, deadline: float) -> str:
    """The verdict on one request. SIGPROF kills the process at the deadline."""
    if _CAN_FORK:
        signal.setitimer(signal.ITIMER_PROF, deadline)
    try:
        return "equal" if equal(gold, answer) else "different"
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except BaseException:
        return "failed"
    finally:
        if _CAN_FORK:
            signal.setitimer(signal.ITIMER_PROF, 0)


def serve(equal: Comparison, source: int, sink: int, deadline: float) -> None:
    """Answer requests until there are no more."""
    while line := read_line(source):
        request = json.loads(line)
        write_verdict(sink, compare(equal, request["gold"], request["answer"], deadline))


class Child:
    """A forked process that answers requests, and the channel to it."""

    def __init__(self, equal: Comparison, deadline: float, not_its_business: tuple[int, ...]) -> None:
        self.channel, other_end = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.channel.close()
                for descriptor in not_its_business:
                    os.close(descriptor)
                serve(equal, other_end.fileno(), other_end.fileno(), deadline)
                os._exit(0)
            finally:
                os._exit(1)
        other_end.close()
        self.status: int | None = None

    def ended(self) -> bool:
        """Whether it has died, without waiting."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def reap(self) -> str:
        """Reap it, and return the verdict on the request that it was working on."""
        self.channel.close()
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        code = os.waitstatus_to_exitcode(self.status)
        return {-signal.SIGPROF: "timeout", _OUT_OF_MEMORY: "failed"}.get(code, "died")


def supervise(equal: Comparison, requests: int, replies: int, deadline: float) -> None:
    """Pass requests to a child, and replace it when it dies. Every request gets exactly one reply."""
    child: Child | None = None
    while request := read_line(requests):
        if child is not None and child.ended():
            child.reap()  # died while idle: no request is to blame
            child = None
        child = child or Child(equal, deadline, (requests, replies))
        with suppress(OSError):  # it has just died, as reading will show
            child.channel.sendall(request)
        with selectors.DefaultSelector() as selector:
            selector.register(child.channel, selectors.EVENT_READ)
            selector.register(requests, selectors.EVENT_READ)
            if all(key.fileobj == requests for key, _ in selector.select()):
                break  # nobody waits for the reply any more
        if reply := read_line(child.channel.fileno()):
            os.write(replies, reply)
        else:
            write_verdict(replies, child.reap())
            child = None
    if child is not None and not child.ended():
        os.kill(child.pid, signal.SIGKILL)
        child.reap()


def main(deadline: float, memory_limit_mb: int, load: Callable[[], Comparison] = load_verifier) -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    requests, replies, nothing = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # a library that prints cannot break the protocol
    limit("RLIMIT_AS", memory_limit_mb * 2**20)
    try:
        equal = load()
    except Exception as error:
        os.write(replies, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode("ascii") + b"\n")
        return
    sys.dont_write_bytecode = True
    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_FSIZE", 0)
    limit("RLIMIT_NOFILE", 64)
    if _CAN_FORK:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        gc.freeze()  # a collection in a child would copy every page of the modules
    os.write(replies, b'{"ready": true}\n')
    (supervise if _CAN_FORK else serve)(equal, requests, replies, deadline)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
