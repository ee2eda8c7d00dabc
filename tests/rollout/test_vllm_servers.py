"""What is asked of vLLM servers, and what happens when one answers wrongly or not at all: with servers of a few lines.

Those of vLLM itself are in ``vllm/test_servers.py``.
"""

import gc
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from lightning_lambdapo import PolicyConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.engine_settings import EngineStartError, VLLMConfig, VLLMServerConfig
from lightning_lambdapo.policy.model import causal_lm
from lightning_lambdapo.rollout.vllm.requests import Request, requests_for, row_seeds
from lightning_lambdapo.rollout.vllm.server_client import OtherWeightsError, Server, ServerGoneError
from lightning_lambdapo.rollout.vllm.servers import VLLMServerEngine

SETTINGS: dict[str, Any] = {
    "model_config": {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"},
    "lora_config": {"max_lora_rank": 8},
}


class Stub:
    """Answers every request with the tokens 5, 6, 1, under the name of its weights."""

    def __init__(self) -> None:
        self.settings = SETTINGS
        self.weights = "run-1"
        self.adapters = {"run-1"}
        self.delay = 0.0
        self.busy_for = self.resets = 0
        self.status = 200
        self.seen: list[tuple[str, Any, str | None]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, answer = stub.answer(self.path, json.loads(body or "null"), self.headers["Authorization"])
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = handle_any  # noqa: N815

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, path: str, body: Any, key: str | None) -> tuple[int, Any]:
        self.seen.append((path, body, key))
        if path.startswith("/server_info"):
            return 200, {"vllm_config": self.settings}
        if path == "/v1/load_lora_adapter":
            self.adapters.add(body["lora_name"])
        if path == "/reset_prefix_cache":
            self.resets += 1
            return 200, {"success": self.resets > self.busy_for}
        if path == "/update_weight_version":
            self.weights = body["new_version"]
        if path != "/inference/v1/generate":
            return 200, None
        time.sleep(self.delay)
        if self.status != 200:
            return self.status, {"error": {"message": "no such thing"}}
        if "model" in body and body["model"] not in self.adapters:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        content = [{"token_id": token, "logprob": -token / 10} for token in (5, 6, 1)]
        spans = [{"version": self.weights, "start": 0, "end": 3}]
        return 200, {"choices": [{"weight_versions": spans, "logprobs": {"content": content}}]}

    def asked(self) -> int:
        return sum(path == "/inference/v1/generate" for path, _, _ in self.seen)

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def stubs() -> Iterator[list[Stub]]:
    found = [Stub(), Stub()]
    yield found
    for each in found:
        each.stop()


def engine(stubs: list[Stub], **settings: Any) -> VLLMServerEngine:
    config = VLLMServerConfig(urls=[each.url for each in stubs], **({"deadline": 100.0} | settings))
    made = VLLMServerEngine(tiny.tokenizer(), (1,), 0, PolicyConfig("model"), config)
    made._run, made.version, made._adapter = "run", 1, True
    return made


def adapted() -> Any:
    """A policy whose adapter has rank 2."""
    return get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def sampled(made: VLLMServerEngine, rows: int = 24) -> Any:
    batch = tiny.batch(tiny.ragged_prompts(4))
    uniforms = torch.rand(rows, 9, dtype=torch.float64)
    return made.generate(tiny.model(), batch, sampling=SamplingConfig(), uniforms=uniforms)


def test_one_request_a_row() -> None:
    batch = tiny.batch([[3, 4], [5, 6, 7]])
    uniforms = torch.tensor([[0.25, 0.9], [0.5, 0.9], [0.75, 0.9], [1.0, 0.9]], dtype=torch.float64)
    sampling = SamplingConfig(temperature=0.7)
    found = requests_for(batch, sampling=sampling, uniforms=uniforms, eos_ids=(1, 9))
    assert [each.prompt for each in found] == [[3, 4], [3, 4], [5, 6, 7], [5, 6, 7]]
    assert [each.settings["seed"] for each in found] == [2**51, 2**52, 2**51 + 2**52, 2**53]
    for each in found:
        assert each.settings["temperature"] == 0.7
        assert each.settings["max_tokens"] == 2
        assert each.settings["stop_token_ids"] == [1, 9]
        assert each.settings["ignore_eos"]
        assert each.settings["logprobs"] == 0


def test_streams_that_differ_give_seeds_that_differ_in_32_bits() -> None:
    """What torch's CPU generator takes of a seed."""
    uniforms = 1 - torch.rand(5000, 1, dtype=torch.float64)
    assert len({seed % 2**32 for seed in row_seeds(uniforms)}) > 4990


def test_servers_share_the_rows(stubs: list[Stub]) -> None:
    for each in stubs:
        each.delay = 0.02
    rollout = sampled(engine(stubs, api_key="secret"))
    assert rollout.completion_ids.tolist() == [[5, 6, 1]] * 24
    torch.testing.assert_close(rollout.sampling_logprobs, torch.tensor([[-0.5, -0.6, -0.1]]).repeat(24, 1))
    assert not rollout.truncated.any()
    assert rollout.entropy is None
    assert stubs[0].asked() + stubs[1].asked() == 24
    assert min(stubs[0].asked(), stubs[1].asked()) >= 8
    path, body, key = next(each for each in stubs[0].seen if "generate" in each[0])
    assert (path, body["model"], key) == ("/inference/v1/generate", "run-1", "Bearer secret")


def test_the_faster_server_gets_more(stubs: list[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lambdapo.rollout.vllm.servers._AT_ONCE", 1)
    stubs[0].delay, stubs[1].delay = 0.2, 0.01
    sampled(engine(stubs))
    assert stubs[1].asked() > 2 * stubs[0].asked()


@pytest.mark.parametrize("adapter", [True, False])
def test_a_restarted_server_gets_the_weights_once_more(stubs: list[Stub], adapter: bool) -> None:
    stubs[0].weights = "default"
    stubs[0].adapters = set()
    made = engine(stubs)
    made._adapter = adapter
    assert sampled(made).completion_ids.tolist() == [[5, 6, 1]] * 24
    assert stubs[0].weights == "run-1"
    assert made.servers[0].deliveries == 1  # though many workers noticed
    assert made.servers[1].deliveries == 0
    paths = [path for path, _, _ in stubs[0].seen if "generate" not in path]
    wanted = ["/v1/load_lora_adapter"] if adapter else ["/collective_rpc", "/reset_prefix_cache"]
    assert paths == [*wanted, "/update_weight_version"]


def test_what_a_dead_server_was_asked_goes_to_the_other(stubs: list[Stub]) -> None:
    stubs[0].stop()
    assert sampled(engine(stubs)).completion_ids.tolist() == [[5, 6, 1]] * 24
    assert stubs[1].asked() == 24


def test_a_deadline_ends_it(stubs: list[Stub]) -> None:
    for each in stubs:
        each.stop()
    with pytest.raises(RuntimeError, match=r"answered 0 of 24 requests within `rollout.servers.deadline` \(0.5 s\)"):
        sampled(engine(stubs, deadline=0.5))


def test_a_server_whose_engine_has_died_answers_so(stubs: list[Stub]) -> None:
    stubs[0].status = 500
    assert sampled(engine(stubs)).completion_ids.tolist() == [[5, 6, 1]] * 24
    assert stubs[1].asked() >= 23


def test_cached_prompts_are_forgotten_before_the_weights_get_their_name(stubs: list[Stub]) -> None:
    """vLLM refuses while requests run, with status 200."""
    stubs[0].busy_for = 2
    server = Server(stubs[0].url)
    server.deliver("run-7", Path("weights"), adapter=False, timeout=100.0)
    assert [path for path, _, _ in stubs[0].seen][-2:] == ["/reset_prefix_cache", "/update_weight_version"]
    assert stubs[0].resets == 3
    stubs[0].busy_for, stubs[0].resets = 10**6, 0
    with pytest.raises(RuntimeError, match="cannot forget prompts of old weights"):
        server.deliver("run-8", Path("weights"), adapter=False, timeout=0.5)
    assert stubs[0].weights == "run-7"


def test_another_release_is_told(stubs: list[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Stub.answer

    def older(stub: Stub, path: str, body: Any, key: str | None) -> tuple[int, Any]:
        status, found = answer(stub, path, body, key)
        if path == "/inference/v1/generate":
            del found["choices"][0]["weight_versions"]
        return status, found

    monkeypatch.setattr(Stub, "answer", older)
    with pytest.raises(RuntimeError, match="it is another release"):
        sampled(engine(stubs))


def test_closing_ends_a_rollout_that_nobody_waits_for(stubs: list[Stub]) -> None:
    for each in stubs:
        each.delay = 0.2
    made = engine(stubs)
    seen: list[BaseException] = []

    def work() -> None:
        try:
            sampled(made, rows=4000)
        except RuntimeError as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.5)
    made.close()
    thread.join(100)
    assert not thread.is_alive()
    assert "was closed while" in str(seen[0])


def test_a_refusal_is_told_at_once(stubs: list[Stub]) -> None:
    stubs[0].status = stubs[1].status = 403
    with pytest.raises(RuntimeError, match=r"/inference/v1/generate answered 403: .*no such thing") as raised:
        sampled(engine(stubs))
    assert "deadline" not in str(raised.value)
    assert sum(each.asked() for each in stubs) <= 24  # nothing is asked twice


def test_answers_of_other_weights_are_not_taken(stubs: list[Stub]) -> None:
    server = Server(stubs[0].url)
    request = Request([3], {"seed": 1})
    stubs[0].weights = "run-0"
    with pytest.raises(OtherWeightsError, match=r"weights \['run-0'\], and not with run-1"):
        server.answer(request, "run-1", adapter=True, timeout=5.0)
    with pytest.raises(OtherWeightsError, match="does not know the adapter run-2"):
        server.answer(request, "run-2", adapter=True, timeout=5.0)
    stubs[0].stop()
    with pytest.raises(ServerGoneError):
        server.answer(request, "run-1", adapter=True, timeout=5.0)
    assert not server.alive


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_config": {"logprobs_mode": "raw_logprobs", "generation_config": "vllm"}}, "--logprobs-mode"),
        ({"model_config": {"logprobs_mode": "processed_logprobs", "generation_config": "auto"}}, "--generation-config"),
        ({"lora_config": None}, "takes no adapters"),
        ({"lora_config": {"max_lora_rank": 1}}, "takes adapters up to rank 1 "),
    ],
)
def test_a_server_with_other_settings_is_refused(
    stubs: list[Stub], tmp_path: Path, settings: Any, message: str
) -> None:
    """The error has the command line that would do, with this run's base, rank and dtype."""
    policy = adapted()
    causal_lm(policy).config.name_or_path = str(tmp_path)
    made = engine(stubs)
    made.policy_config = PolicyConfig(str(tmp_path))
    assert made.servers[1].misfits(8) == []
    assert "rank 8" in made.servers[1].misfits(16)[0]
    stubs[1].settings = SETTINGS | settings
    flags = "--enable-lora --max-lora-rank 8 --dtype float32"
    command = f"Start it with: VLLM_SERVER_DEV_MODE=1 .*vllm serve {tmp_path} .*{flags}"
    with pytest.raises(EngineStartError, match=rf"{made.servers[1].url} cannot serve this run.*{message}.*{command}"):
        made.sync(policy, 1)
    stubs[1].settings = SETTINGS
    stubs[0].stop()
    made.config = replace(made.config, deadline=0.2)
    with pytest.raises(EngineStartError, match=rf"{made.servers[0].url} does not answer within .*{command}"):
        made.sync(policy, 1)


def test_files_go_with_the_engine_also_without_a_close(stubs: list[Stub], tmp_path: Path) -> None:
    """As when a run ends by an exception."""
    policy = adapted()
    made = engine(stubs, directory=str(tmp_path / "shared"))
    for version in (1, 2):
        made.sync(policy, version)
    root = made._root
    assert root is not None
    assert [each.name for each in root.iterdir()] == [f"{made._run}-2"], "the version before is gone"
    del made
    gc.collect()
    assert not root.exists()
    assert (tmp_path / "shared").is_dir(), "the user's own"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "vllm", "sampling": SamplingConfig(top_p=0.9)}, "top_p, and `rollout.engine` is vllm"),
        ({"engine": "vllm", "max_live_tokens": 100}, "which vllm does not read"),
        ({"engine": "vllm_server"}, "`rollout.servers.urls` is empty"),
        ({"engine": "sglang"}, "`rollout.engine` must be one of"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"kv_cache_gb": 0.0}, "kv_cache_gb"),
        ({"kv_cache_gb": float("inf")}, "kv_cache_gb"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"options": {"model": "other", "seed": 1}}, "contains model, seed"),
    ],
)
def test_settings_of_vllm_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": ["localhost:8000"]}, "must begin with http"),
        ({"urls": ["http://a:1", "http://a:1"]}, "names a server twice"),
        ({"urls": ["http://a:1"], "deadline": 0.0}, "deadline"),
    ],
)
def test_settings_of_servers_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMServerConfig(**settings)
