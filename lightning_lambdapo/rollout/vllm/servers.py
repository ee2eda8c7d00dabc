"""Rollouts by vLLM servers on other GPUs or machines."""

import queue
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.config import PolicyConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.distributed.parallel import gather_objects, rank
from lightning_lambdapo.engine_settings import EngineStartError, VLLMServerConfig
from lightning_lambdapo.policy.model import Policy
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.vllm.requests import Answer, Request, requests_for, rollout_of
from lightning_lambdapo.rollout.vllm.server_client import OtherWeightsError, Server, ServerGoneError, start_command
from lightning_lambdapo.rollout.vllm.weights import (
    adapter_rank,
    base_directory,
    check_servable,
    write_adapter,
    write_weights,
)

_AT_ONCE = 64
_POLL_SECONDS = 2.0


class VLLMServerEngine(RolloutEngine):
    """vLLM servers that share each batch.

    Every version of the trained weights is written to a directory that training and servers see, and loaded from there.
    Each answer carries the name of the weights it comes from. A server that has others, as after a restart, gets the
    current ones and is asked again. What a server that has died was asked goes to the others, and it gets the current
    weights when it is back.

    Args:
        tokenizer: decodes the completions.
        eos_ids: every token id that ends a completion.
        pad_id: id written after the end.
        policy: where the base comes from.
        config: addresses, directory, deadline.
    """

    has_own_weights = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        pad_id: int,
        policy: PolicyConfig,
        config: VLLMServerConfig,
    ) -> None:
        super().__init__(tokenizer, eos_ids, pad_id)
        self.policy_config = policy
        self.config = config
        self.max_staleness = config.max_staleness
        self.servers = [Server(url, config.api_key) for url in config.urls]
        self._checked = False
        self._closed = threading.Event()
        self._remove: Callable[[], object] = bool
        self._run = ""
        self._root: Path | None = None
        self._adapter = False

    def sync(self, policy: Policy, version: int) -> None:
        """Write the policy's weights and let the servers load them. See :meth:`RolloutEngine.sync`."""
        self._adapter = isinstance(policy, PeftModel)
        if not self._checked:
            self._closed.clear()
            self._start(policy)
        old = self._name, self._directory
        self.version = version
        # Rank 0 writes and delivers. The others wait, and find what went wrong there.
        problem = None
        if rank() == 0:
            try:
                self._deliver(policy, *old)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        for each in gather_objects(problem):
            if each is not None:
                raise RuntimeError(each)
        for server in self.servers:  # a dead one is noticed again
            server.alive = True

    def generate(
        self, model: PreTrainedModel, batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        """Generate completions. See :meth:`RolloutEngine.generate`."""
        requests = requests_for(batch, sampling=sampling, uniforms=uniforms, eos_ids=self.eos_ids)
        answers = self._answers(requests)
        return rollout_of(self, answers, length=uniforms.shape[1], device=batch.input_ids.device)

    def check(self, policy: Policy) -> None:
        """Refuse what vLLM cannot serve. See :meth:`RolloutEngine.check`."""
        check_servable(policy, self.policy_config)

    @property
    def cached_block(self) -> int | None:
        """Block size of vLLM. An adapter's name is part of the cache's keys, so no cached prompt outlives a version."""
        return None if self._adapter else 16

    def close(self) -> None:
        """Stop asking, and remove the files. The servers keep running."""
        self._closed.set()
        if self._root is not None and rank() == 0:
            for server in self.servers if self._adapter else ():
                _quietly(server.forget, self._name, timeout=10.0)
            self._remove()
        self._root, self._checked, self.version = None, False, -1

    @property
    def _name(self) -> str:
        return f"{self._run}-{self.version}"

    @property
    def _directory(self) -> Path:
        return (self._root or Path()) / self._name

    def _start(self, policy: Policy) -> None:
        """Agree on a directory, and wait until the servers answer."""
        wanted = None
        if rank() == 0:
            parent = self.config.directory
            if parent is not None:
                Path(parent).mkdir(parents=True, exist_ok=True)
            root = tempfile.mkdtemp(prefix="lambdapo_", dir=parent)
            Path(root).chmod(0o755)  # servers may run as another user
            wanted = root, f"lambdapo-{uuid.uuid4().hex[:8]}"
        root, self._run = gather_objects(wanted)[0]
        self._root = Path(root)
        if rank() == 0:  # also if a run ends by an exception
            self._remove = weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        end = time.monotonic() + self.config.deadline
        missing = [server for server in self.servers if not server.is_ready()]
        if missing:
            rank_zero_info(
                f"Waiting for {', '.join(server.url for server in missing)}. If it is not starting yet, start it with: "
                f"{self._command(policy)}"
            )
        while missing:
            if time.monotonic() > end:
                raise EngineStartError(
                    f"{missing[0].url} does not answer within `rollout.servers.deadline` ({self.config.deadline:g} s). "
                    f"Start it with: {self._command(policy)}"
                )
            time.sleep(_POLL_SECONDS)
            missing = [server for server in missing if not server.is_ready()]
        needed_rank = _rank_needed(policy)
        for server in self.servers:
            wrong = server.misfits(needed_rank)
            if wrong:
                raise EngineStartError(
                    f"{server.url} cannot serve this run: {', '.join(wrong)}. Start it with: {self._command(policy)}"
                )
        self._checked = True

    def _command(self, policy: Policy) -> str:
        place, _ = base_directory(policy, self.policy_config)
        return start_command(place, _rank_needed(policy), self.policy_config.dtype)

    def _deliver(self, policy: Policy, old_name: str, old_directory: Path) -> None:
        partial = self._directory.with_suffix(".partial")
        if isinstance(policy, PeftModel):
            write_adapter(policy, partial)
        else:
            partial.mkdir(parents=True)
            write_weights(policy, partial)
        partial.rename(self._directory)
        reached = 0
        for server in self.servers:
            try:
                self._bring_up_to_date(server, self.config.deadline)
                reached += 1
                if self._adapter and old_directory.is_dir():
                    _quietly(server.forget, old_name, timeout=10.0)
            except ServerGoneError as error:
                rank_zero_warn(f"A vLLM server got no new weights, because it does not answer: {error}")
        if not reached:
            raise RuntimeError("No vLLM server answers. Restart one, and resume the run from its last checkpoint.")
        if old_directory.is_dir():
            shutil.rmtree(old_directory, ignore_errors=True)

    def _bring_up_to_date(self, server: Server, timeout: float, *, after: int | None = None) -> None:
        """Give a server the current weights, unless it got some ``after`` that many deliveries."""
        with server.lock:
            if after is None or server.deliveries == after:
                server.deliver(self._name, self._directory, adapter=self._adapter, timeout=timeout)

    def _answers(self, requests: list[Request]) -> list[Answer]:
        """All answers in order. Each server takes the next request when it has finished one."""
        end = time.monotonic() + self.config.deadline
        found: dict[int, Answer] = {}
        trouble: list[str] = []
        while len(found) < len(requests):
            if self._closed.is_set():
                raise RuntimeError("The engine was closed while a rollout was being sampled.")
            waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
            for index in range(len(requests)):
                if index not in found:
                    waiting.put(index)
            left = end - time.monotonic()
            live = [server for server in self.servers if server.alive or self._is_back(server, left)]
            self._work_off(live, requests, waiting, found, trouble, end)
            if time.monotonic() > end:
                raise RuntimeError(
                    f"vLLM servers answered {len(found)} of {len(requests)} requests within "
                    f"`rollout.servers.deadline` ({self.config.deadline:g} s). Last trouble: "
                    f"{trouble[-1] if trouble else 'none, so that the deadline is too short for such a rollout'}"
                )
            if not live:
                self._closed.wait(_POLL_SECONDS)
        return [found[index] for index in range(len(requests))]

    def _work_off(
        self,
        live: list[Server],
        requests: list[Request],
        waiting: "queue.SimpleQueue[int]",
        found: dict[int, Answer],
        trouble: list[str],
        end: float,
    ) -> None:
        fatal: list[RuntimeError] = []

        def work(server: Server) -> None:
            while server.alive and not fatal and not self._closed.is_set() and time.monotonic() < end:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                deliveries = server.deliveries
                try:
                    found[index] = server.answer(
                        requests[index], self._name, adapter=self._adapter, timeout=end - time.monotonic()
                    )
                except (ServerGoneError, OtherWeightsError) as error:
                    waiting.put(index)
                    trouble.append(str(error))
                    if isinstance(error, OtherWeightsError):
                        _quietly(self._bring_up_to_date, server, end - time.monotonic(), after=deliveries)
                        if server.deliveries == deliveries:
                            self._closed.wait(_POLL_SECONDS)
                except RuntimeError as error:  # it refuses the request, and so would every other
                    fatal.append(error)

        count = min(_AT_ONCE, -(-waiting.qsize() // max(1, len(live))))
        threads = [threading.Thread(target=work, args=(server,), daemon=True) for server in live for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if fatal:
            raise fatal[0]

    def _is_back(self, server: Server, timeout: float) -> bool:
        """Whether a server that has died answers again. It then gets the current weights."""
        if not server.is_ready():
            return False
        try:
            self._bring_up_to_date(server, timeout)
        except (ServerGoneError, RuntimeError):
            return False
        server.alive = True
        return True


def _rank_needed(policy: Policy) -> int | None:
    return adapter_rank(policy) if isinstance(policy, PeftModel) else None


def _quietly(call: Callable[..., None], *arguments: Any, **settings: Any) -> None:
    """Call what may fail without harm: it is tried again, or no longer needed."""
    with suppress(ServerGoneError, RuntimeError):
        call(*arguments, **settings)
