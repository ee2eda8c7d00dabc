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
import re
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Comparison = Callable[[str, str], bool]
Numbers = Callable[[Any, Any, int, int], bool]

_OUT_OF_MEMORY = 3  # exit code of a child, because a fresh one is safer than one that ran out of memory
_CAN_FORK = hasattr(os, "fork") and hasattr(signal, "setitimer")


def load_verifier() -> Comparison:
    """Import math-verify (0.5 to 1 s) and return the comparison of a gold answer with an answer."""
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, grader, parse, verify
    from sympy import Eq, Expr, FiniteSet, I, MatrixBase, Set  # type: ignore[import-untyped]

    grader.sympy_numeric_eq = relative(grader.sympy_numeric_eq)
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

    def same_region(sides: tuple[str, str], parsed: tuple[Any, Any]) -> bool:
        """Whether inequalities, such as x > 4, describe the interval or set on the other side."""
        for relations, read_other in ((sides[1], parsed[0]), (sides[0], parsed[1])):
            others = [item.rhs if isinstance(item, Eq) and isinstance(item.rhs, Set) else item for item in read_other]
            if len(others) == 1 and isinstance(others[0], Set):
                try:
                    found = region(relations, read)
                except MemoryError:
                    raise
                except Exception:  # no inequalities: nothing to compare
                    return False
                if found is not None and same([found], others):
                    return True
        return False

    def equal(gold: str, answer: str) -> bool:
        sides = read(gold), read(answer)
        if same(*sides) or same_region((gold, answer), sides):
            return True
        with suppress(TypeError, ValueError):  # complex numbers have no order
            complex_sides = [[complex_number(item) for item in side] for side in sides]
            return complex_sides != list(sides) and same(*complex_sides)
        return False

    equal(r"\frac{\sqrt{8}}{2}", r"\sqrt{2}")  # load now what is loaded lazily, for all children
    return equal


def relative(numeric_equal: Numbers) -> Numbers:
    """math-verify's comparison of numbers, which takes all below about 1e-16 for 0, made relative to their size."""
    from sympy import Float, MatrixBase, MatrixExpr, Number, S, expand

    def near(first: Any, second: Any, tolerance: float) -> bool:
        difference = abs((first - second).evalf(30))  # of exact numbers right to many more digits than their own
        return bool(difference <= tolerance * max(abs(first.evalf(30)), abs(second.evalf(30))))

    def confirmed(first: Any, second: Any, precision: int) -> bool:
        floats = first.has(Float) or second.has(Float)
        if isinstance(first, Number) or isinstance(second, Number):
            return not floats or near(first.doit(), second.doit(), 1e-3)  # 0.333333 is 1/3
        if (first - second).evalf(precision) == 0:
            return True
        tolerance = 1e-12 if floats else 1e-60
        if not first.free_symbols and not second.free_symbols:
            return near(first, second, tolerance)
        terms = [expand(side.doit()).as_coefficients_dict() for side in (first, second)]
        return all(near(S(terms[0][term]), S(terms[1][term]), tolerance) for term in {*terms[0], *terms[1]})

    def compare(first: Any, second: Any, rounding: int, precision: int) -> bool:
        equal = numeric_equal(first, second, rounding, precision)
        if equal and not isinstance(first, MatrixBase | MatrixExpr):  # of matrices, this compares every entry
            with suppress(AttributeError, NotImplementedError, TypeError, ValueError):  # such as infinity
                return confirmed(first, second, precision)
        return equal

    return compare


def region(text: str, read: Callable[[str], Any]) -> Any:
    """The numbers for which inequalities between one variable and numbers hold, such as x < 1 or x > 3, or None.

    Only with the variable alone on one side: x^2 < 4 is a question, and no answer to it.
    """
    from latex2sympy2_extended.logic import And  # type: ignore[import-untyped]
    from sympy import Eq, Intersection, Reals, Rel, Symbol, Union

    def numbers(relation: Any, names: set[Any]) -> Any:
        if isinstance(relation, And):
            parts = [numbers(part, names) for part in relation._unsorted_args]
            return None if None in parts else Intersection(Reals, *parts)
        if not isinstance(relation, Rel) or isinstance(relation, Eq):
            return None
        names |= relation.free_symbols
        alone = {side for side in (relation.lhs, relation.rhs) if isinstance(side, Symbol)}
        return relation.as_set() if len(names) == 1 and alone == names and None not in alone else None

    builder = re.fullmatch(r"\s*\\?\{\s*[A-Za-z]\s*(?:\\in\s*[^|:<>]{1,30}?)?(?:\\mid|\||:)(.*?)\\?\}\s*", text)
    text = builder[1] if builder else text
    names: set[Any] = set()
    either = []
    for alternative in re.split(r"\\(?:text|mbox|mathrm)\s?\{\s*or\s*\}|\bor\b|\\(?:lor|vee)(?![A-Za-z])|\\cup", text):
        both = re.split(r"\\(?:text|mbox|mathrm)\s?\{\s*and\s*\}|\band\b|\\(?:land|wedge)(?![A-Za-z])", alternative)
        if not any(mark in alternative for mark in ("<", ">", "\\l", "\\g", "\\ne")):
            return None
        parts = [numbers(item, names) for part in both for item in read(part)]
        if not parts or any(part is None for part in parts):
            return None
        either.append(Intersection(*parts))
    found = Union(*either)
    return None if found.is_empty else found


def limit(name: str, value: int) -> None:
    """Limit a resource permanently, where the platform can."""
    with suppress(ImportError, AttributeError, OSError, ValueError):
        import resource

        resource.setrlimit(getattr(resource, name), (value, value))


def read_line(source: int) -> bytes:
    """The next line, unbuffered. Empty at the end of input. The other side sends one line at a time, and waits."""
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
