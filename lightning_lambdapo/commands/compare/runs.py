"""Training runs, each in its own process: resumable, logged, ended with the parent."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import yaml

from lightning_lambdapo.commands.compare.plan import Run
from lightning_lambdapo.commands.compare.settings import is_part, option_keys, with_options, with_settings
from lightning_lambdapo.runs.files import section

_CSV = "lightning.pytorch.loggers.CSVLogger"
_FINISHED = "finished.json"


def finished(run: Run) -> bool:
    """Whether a run has succeeded. It is not repeated then."""
    return (run.directory / _FINISHED).exists()


def prepare(run: Run, base: Mapping[str, Any], arguments: Sequence[str]) -> list[str]:
    """Write a run's configuration into its directory, and return the command line that starts or resumes the run.

    The run logs every step to CSV in its directory, in addition to the loggers of the base configuration. Its seed is
    used for sampling and, with this package's data module, for the order of the prompts.

    Raises:
        ValueError: an option or a varied setting is one that each run sets itself, or the directory contains logs or
            checkpoints of other settings. The files of a run that failed before its first log are overwritten.
    """
    settings = run.arm.settings | run.arm.tuned
    base, options = with_options(base, arguments, settings)
    own: dict[str, Any] = {
        "seed_everything": run.seed,
        "trainer.default_root_dir": str(run.directory),
        "trainer.log_every_n_steps": 1,
    }
    data = base.get("data") or {}
    if isinstance(data, dict) and data.get("class_path", "LambdaPODataModule").endswith("LambdaPODataModule"):
        own["data.seed"] = run.seed
    if section(base, "model").get("seed") is not None:
        own["model.seed"] = None  # the sampling seed then follows seed_everything
    given = [*option_keys(arguments), *settings]
    for name in (*own, "model.seed", "trainer.logger", "ckpt_path"):
        if any(is_part(key, name) for key in given):
            raise ValueError(f"`compare` sets {name} for each run. Drop it from the options.")
    config = with_settings(base, settings | own)
    trainer = config["trainer"]
    loggers = trainer.get("logger")
    others = loggers if isinstance(loggers, list) else [loggers] if isinstance(loggers, dict | str) else []
    csv = {"class_path": _CSV, "init_args": {"save_dir": str(run.directory), "flush_logs_every_n_steps": 1}}
    trainer["logger"] = [csv, *others]
    trainer["enable_progress_bar"] = False
    file = run.directory / "config.yaml"
    whole = yaml.safe_dump({"config": config, "arguments": list(arguments)}, sort_keys=False)
    record = run.directory / "run.yaml"
    if record.exists() and record.read_text(encoding="utf-8") != whole and _has_learnt(run):
        raise ValueError(
            f"{run.directory} holds a run of other settings (see its run.yaml). Choose another --output, or remove it."
        )
    run.directory.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    record.write_text(whole, encoding="utf-8")
    return ["fit", f"--config={file}", *options, "--ckpt_path=last"]


def _has_learnt(run: Run) -> bool:
    return any(path.name == "metrics.csv" or path.suffix == ".ckpt" for path in run.directory.rglob("*"))


def train_all(
    commands: Sequence[tuple[Run, list[str]]], *, workers: int, report: Callable[[Run, bool, float], None]
) -> list[Run]:
    """Train the runs in order, ``workers`` at a time.

    Args:
        commands: the runs with their command lines.
        workers: processes at once. More than one share the cores evenly. Each uses the whole GPU.
        report: called as each run ends: the run, whether it succeeded, its seconds.

    Returns:
        The runs that failed. ``train.log`` in their directories says why.
    """
    context = _context()
    threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None
    waiting = list(commands)
    running: dict[Any, tuple[Run, Any, float]] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                run, arguments = waiting.pop(0)
                process = context.Process(target=_train, args=(arguments, str(run.directory / "train.log"), threads))
                process.start()
                running[process.sentinel] = run, process, time.monotonic()
            for sentinel in wait(list(running)):
                run, process, start = running.pop(sentinel)
                process.join()
                seconds = time.monotonic() - start
                if process.exitcode == 0:
                    (run.directory / _FINISHED).write_text(json.dumps({"seconds": round(seconds, 1)}))
                else:
                    failed.append(run)
                report(run, process.exitcode == 0, seconds)
    finally:
        for _, process, _ in running.values():
            _kill(process.pid)
    return failed


def _context() -> ForkServerContext | SpawnContext:
    """Fresh processes that share only the imports, where the system supports it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lightning_lambdapo.commands.main", "lightning_lambdapo.commands.compare.runs", "matplotlib.figure"]
    )
    return context


def _train(arguments: list[str], log: str, threads: int | None) -> None:
    """One run, in a process of its own."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # so that its own workers end with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Path(log).open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch

    from lightning_lambdapo import __main__ as program
    from lightning_lambdapo.commands.main import main

    sys.modules["__main__"] = program  # a strategy starts its other ranks as this program, with these arguments
    sys.argv = [str(program.__file__), *arguments]
    if threads is not None:
        torch.set_num_threads(threads)
    main(arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        _kill(os.getpid())


def _kill(pid: int | None) -> None:
    """Kill a process and those that it has started. The run can resume from its last checkpoint."""
    if pid is None:
        return
    try:
        if hasattr(os, "killpg") and os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
