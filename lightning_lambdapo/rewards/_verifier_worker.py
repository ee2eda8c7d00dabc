"""The program of one math-verify worker process; :mod:`lightning_lambdapo.rewards.verifier` runs it as a script.

It reads requests ``{"gold": ..., "answer": ...}``, a JSON line each, and answers every one with ``{"equal": true}``,
``false`` or ``null`` (it failed). Only LaTeX is parsed: math-verify's route for plain expressions goes through
``eval``. Its own timeouts (SIGALRM) are off, because the parent kills this process at the deadline. Nothing of this
package is imported, so that a worker starts fast and holds no copy of torch.
"""

import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def load_verifier() -> Callable[[str, str], bool]:
    """Import math-verify (0.5 to 1 s) and return the comparison of a gold answer with an answer."""
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    extraction = [LatexExtractionConfig()]

    def read(text: str) -> Any:
        latex = " ".join(text.replace("$", " ").replace("**", "^").split())
        return parse(f"${latex}$", extraction, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)

    def equal(gold: str, answer: str) -> bool:
        return bool(verify(read(gold), read(answer), timeout_seconds=None, raise_on_error=True))

    return equal


def limit_memory(megabytes: int) -> None:
    """Bound the address space, where the platform can."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))


def limit_cpu(seconds: float) -> None:
    """Let the process die ``seconds`` of CPU time from now: the end of a request whose parent was killed meanwhile."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main(deadline: float, memory_limit_mb: int) -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a library that prints cannot break the protocol

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        limit_memory(memory_limit_mb)
        equal = load_verifier()
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return
    reply(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        limit_cpu(2 * deadline)
        try:
            verdict = equal(request["gold"], request["answer"])
        except MemoryError:
            reply(equal=None)
            return  # a fresh process is safer than one that ran out of memory
        except BaseException:
            reply(equal=None)
        else:
            reply(equal=verdict)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
