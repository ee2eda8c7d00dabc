"""Run a function on several processes that see each other as torchrun's ranks do.

They are forked from a server that has imported everything once and done nothing else, so that starting one costs a
fraction of a second and inherits no threads of the test process. Each rank is the leader of a process group of its
own; whatever is left of one at the deadline is killed.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_HERE = Path(__file__).parent


def _start_server() -> None:
    """Start the server that imports everything once; it finds modules by its environment alone."""
    forkserver.set_forkserver_preload(["fitting"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (_HERE, _HERE.parent)))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (negative for a signal), and what it printed."""

    code: int
    log: str


def on_ranks(
    count: int,
    function: Callable[..., object],
    *arguments: Any,
    logs: Path,
    timeout: float = 120,
    nodes: int = 1,
    **options: Any,
) -> list[Ended]:
    """Call ``function(*arguments, **options)`` on ``count`` ranks of ``nodes`` machines, and wait until all have ended.

    A rank that is still there at the deadline fails the test, with what it was doing.
    """
    logs.mkdir(parents=True, exist_ok=True)
    _start_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = [logs / f"rank{rank}.log" for rank in range(count)]
    start = time.monotonic()
    ranks = [
        _CONTEXT.Process(target=_rank, args=(rank, count, nodes, port, files[rank], function, arguments, options))
        for rank in range(count)
    ]
    try:
        for process in ranks:
            process.start()
        while any(process.exitcode is None for process in ranks):
            if time.monotonic() - start > timeout:
                for process in ranks:
                    if process.exitcode is None and process.pid is not None:
                        os.kill(process.pid, signal.SIGUSR2)  # faulthandler prints where it hangs
                time.sleep(0.5)
                raise AssertionError("hangs:\n" + "\n".join(file.read_text()[-3000:] for file in files))
            time.sleep(0.02)
    finally:
        for process in ranks:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join(10)
    return [
        Ended(int(process.exitcode or 0), file.read_text(errors="replace"))
        for process, file in zip(ranks, files, strict=True)
    ]


def succeed(ended: list[Ended]) -> None:
    """Fail with the log of the first rank that did."""
    for rank, each in enumerate(ended):
        assert each.code == 0, f"rank {rank} ended with {each.code}:\n{each.log[-4000:]}"


def _rank(
    rank: int,
    count: int,
    nodes: int,
    port: int,
    log: Path,
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    import faulthandler

    import torch

    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if count > 1:
        local = count // nodes
        names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
        names |= {"GROUP_RANK": rank // local}
        os.environ |= {name: str(value) for name, value in names.items()} | {"TORCHELASTIC_RUN_ID": str(port)}
    code = 1
    try:
        function(*arguments, **options)
        code = 0
    except SystemExit as error:
        traceback.print_exc()
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
