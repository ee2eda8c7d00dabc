"""The HTTP endpoints of one vLLM server."""

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_lambdapo.rollout.vllm.requests import Answer, Request


def start_command(model: str, adapter_rank: int | None, dtype: str) -> str:
    """The command line that starts a server. ``adapter_rank`` is None where all weights are trained."""
    lora = "" if adapter_rank is None else f" --enable-lora --max-lora-rank {adapter_rank}"
    return (
        f"VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {model} --enable-scale-out "
        f"--logprobs-mode processed_logprobs --generation-config vllm{lora} --dtype {dtype}"
    )


class ServerGoneError(ConnectionError):
    """A server does not answer."""


class OtherWeightsError(RuntimeError):
    """A server has answered with other weights than those that were delivered last, as after a restart."""


class Server:
    """A vLLM server.

    Args:
        url: its address.
        api_key: its key.

    Attributes:
        alive: whether it answered last time.
        deliveries: how often it was given weights.
        lock: held while it is given weights.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.alive = True
        self.deliveries = 0
        self.lock = threading.Lock()
        self._parts = urlsplit(self.url)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def is_ready(self) -> bool:
        """True if it answers now."""
        try:
            self._call("GET", "/health", timeout=5.0)
        except (ServerGoneError, RuntimeError):
            return False
        return True

    def misfits(self, adapter_rank: int | None) -> list[str]:
        """What is wrong with its settings: they would give other log-probabilities, or take no weights.

        Args:
            adapter_rank: the rank that it must take, or None where all weights are trained.
        """
        try:
            config = self._call("GET", "/server_info?config_format=json", timeout=60.0)["vllm_config"]
        except RuntimeError as error:
            return [f"it does not tell its settings ({error})"]
        wrong = []
        if config["model_config"]["logprobs_mode"] != "processed_logprobs":
            wrong.append("its log-probabilities are those before the temperature (--logprobs-mode)")
        if config["model_config"].get("generation_config") != "vllm":
            wrong.append("it uses the sampling settings of the model's authors (--generation-config)")
        taken = (config.get("lora_config") or {}).get("max_lora_rank", 0)
        if adapter_rank is not None and taken < adapter_rank:
            what = f"adapters up to rank {taken}" if taken else "no adapters"
            wrong.append(f"it takes {what} (--enable-lora --max-lora-rank)")
        return wrong

    def deliver(self, name: str, directory: Path, *, adapter: bool, timeout: float) -> None:
        """Load the weights in a directory that the server sees, and let answers carry their name."""
        if adapter:
            body = {"lora_name": name, "lora_path": str(directory)}
            try:
                self._call("POST", "/v1/load_lora_adapter", body, timeout=timeout)
            except RuntimeError as error:
                if "already been loaded" not in str(error):
                    raise
        else:
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
            self._call("POST", "/collective_rpc", call, timeout=timeout)
            self._forget_prompts(timeout)
        self._call("POST", "/update_weight_version", {"new_version": name}, timeout=timeout)
        self.deliveries += 1

    def _forget_prompts(self, timeout: float) -> None:
        """Forget prompts that were computed with old weights. Impossible while requests run there, so wait for them."""
        end = time.monotonic() + timeout
        while not self._call("POST", "/reset_prefix_cache", timeout=timeout)["success"]:
            if time.monotonic() > end:
                raise RuntimeError(f"{self.url} cannot forget prompts of old weights, because requests still run there")
            time.sleep(0.2)

    def forget(self, name: str, *, timeout: float) -> None:
        """Unload an adapter."""
        self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, timeout=timeout)

    def answer(self, request: Request, name: str, *, adapter: bool, timeout: float) -> Answer:
        """Sample one completion with the weights of this name.

        Raises:
            OtherWeightsError: it has others.
            ServerGoneError: it does not answer.
        """
        body = {"token_ids": request.prompt, "sampling_params": request.settings}
        try:
            found = self._call(
                "POST", "/inference/v1/generate", body | ({"model": name} if adapter else {}), timeout=timeout
            )
        except RuntimeError as error:
            if adapter and "does not exist" in str(error):
                raise OtherWeightsError(f"{self.url} does not know the adapter {name}") from error
            raise
        try:
            choice = found["choices"][0]
            versions = {span["version"] for span in choice["weight_versions"] or []}
            content = choice["logprobs"]["content"]
            answer = Answer([each["token_id"] for each in content], [each["logprob"] for each in content])
        except (KeyError, TypeError, IndexError) as error:
            raise RuntimeError(
                f"{self.url} answers in a form that vLLM 0.32 and 0.33 do not have ({error!r}): it is another release."
            ) from error
        if versions != {name}:
            raise OtherWeightsError(f"{self.url} answered with weights {sorted(versions)}, and not with {name}")
        return answer

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float) -> Any:
        kind = _KeptAliveTLS if self._parts.scheme == "https" else _KeptAlive
        connection = kind(self._parts.netloc, timeout=max(timeout, 0.1))
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, self._parts.path + path, text, self._headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.alive = False
            raise ServerGoneError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        told = f"{self.url}{path} answered {response.status}: {content[:500].decode(errors='replace')}"
        if response.status >= http.client.INTERNAL_SERVER_ERROR:  # its engine has died
            self.alive = False
            raise ServerGoneError(told)
        if response.status != http.client.OK:
            raise RuntimeError(told)
        is_json = response.getheader("Content-Type", "").startswith("application/json")
        return json.loads(content) if is_json else content.decode()


class _KeptAlive(http.client.HTTPConnection):
    """A connection that fails within half a minute when the other machine has gone without a word."""

    def connect(self) -> None:
        super().connect()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _KeptAliveTLS(http.client.HTTPSConnection, _KeptAlive):
    """The same, encrypted."""
