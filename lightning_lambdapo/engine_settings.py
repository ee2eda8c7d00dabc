"""Settings of the rollout engines that are programs of their own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_lambdapo.functional.masking import check_choice
from lightning_lambdapo.functional.ranges import check_real, check_whole, path_text

Engine = Literal["grouped", "hf", "vllm", "vllm_server"]


class EngineStartError(RuntimeError):
    """An engine cannot start with these settings. The sentence says why, and what to change."""


@dataclass(frozen=True)
class VLLMConfig:
    """A vLLM engine inside the training process, on the same device: ``rollout.engine: vllm``.

    Attributes:
        gpu_memory_utilization: share of the GPU's memory that the engine may use, weights included. Training needs the
            rest. On a CPU it has no meaning.
        kv_cache_gb: memory in GB (1e9 bytes) for keys and values. None is what ``gpu_memory_utilization`` leaves, and
            1 on a CPU.
        max_model_len: longest prompt and completion together, in tokens. None is the longest that fits in memory.
        enforce_eager: True computes without ``torch.compile`` and CUDA graphs. None does so on a CPU, where compiling
            takes longer than it saves.
        sleep: free the engine's memory while the policy learns. None does so on CUDA. True elsewhere is an error.
        options: further arguments of ``vllm.LLM``, such as ``max_num_seqs`` or ``enable_prefix_caching``.
    """

    gpu_memory_utilization: float = 0.4
    kv_cache_gb: float | None = None
    max_model_len: int | None = None
    enforce_eager: bool | None = None
    sleep: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_real(
            "rollout.vllm.gpu_memory_utilization",
            self.gpu_memory_utilization,
            lambda share: 0 < share <= 1,
            "in (0, 1]",
        )
        if self.kv_cache_gb is not None:
            check_real("rollout.vllm.kv_cache_gb", self.kv_cache_gb, lambda size: 0 < size < math.inf, "above 0")
        if self.max_model_len is not None:
            check_whole("rollout.vllm.max_model_len", self.max_model_len, 2, reason=", for a prompt and a token")
        own = sorted(self.options.keys() & _OWN)
        if own:
            raise ValueError(
                f"`rollout.vllm.options` contains {', '.join(own)}, which the engine sets itself from `policy` and the "
                "other settings. Remove it there."
            )


#: Arguments of ``vllm.LLM`` that decide whether its tokens come from the trained policy, or that have a setting above.
_OWN = {
    *("model", "tokenizer", "skip_tokenizer_init", "revision", "quantization", "seed", "logprobs_mode"),
    *("generation_config", "enable_lora", "max_lora_rank", "enable_sleep_mode", "distributed_executor_backend"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "enforce_eager", "tensor_parallel_size"),
}


@dataclass(frozen=True)
class VLLMServerConfig:
    """vLLM servers on other GPUs or machines: ``rollout.engine: vllm_server``.

    Each is a ``vllm serve`` of the policy's base, see rollout/README.md for its command line.

    Attributes:
        urls: addresses of the servers, such as ``http://10.0.0.2:8000``. A batch is shared among them by load.
        directory: a directory that training and servers see under this path. Each version of the trained weights is
            written to it. None is a temporary directory, for servers on the same machine.
        deadline: seconds for one rollout or one delivery of weights. Requests are repeated until then, on other
            servers if their own has died.
        api_key: key that the servers were started with.
        max_staleness: 1 samples the next rollout while the policy learns from this one. Its tokens then come from the
            weights before that update, which ``algorithm.importance_correction`` corrects. 0 waits.
    """

    urls: list[str] = field(default_factory=list)
    directory: str | None = None
    deadline: float = 1800.0
    api_key: str | None = None
    max_staleness: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", path_text(self.directory))
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"`rollout.servers.urls` must begin with http:// or https://, got {url!r}.")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"`rollout.servers.urls` names a server twice: {', '.join(self.urls)}.")
        check_whole("rollout.servers.max_staleness", self.max_staleness, 0, highest=1)
        check_real("rollout.servers.deadline", self.deadline, lambda time: 0 < time < math.inf, "above 0 seconds")


def check_engine(
    engine: str, servers: VLLMServerConfig, filters: Sequence[str], max_live_tokens: int | None, reserve_prompts: int
) -> None:
    """Refuse an engine that does not exist, and settings that a vLLM engine would not follow.

    Args:
        engine: ``rollout.engine``.
        servers: settings of ``"vllm_server"``.
        filters: names of the sampling settings that remove tokens.
        max_live_tokens: ``rollout.max_live_tokens``.
        reserve_prompts: ``rollout.reserve_prompts``.
    """
    check_choice("rollout.engine", engine, get_args(Engine))
    if not engine.startswith("vllm"):
        return
    if filters:
        raise ValueError(
            f"`rollout.sampling` sets {', '.join(filters)}, and `rollout.engine` is {engine}: vLLM gives log-"
            "probabilities among the tokens that are left, which are not those of the policy. Remove the filter, or "
            "set `rollout.engine: grouped`."
        )
    if max_live_tokens is not None:
        raise ValueError(
            f"`rollout.max_live_tokens` is {max_live_tokens}, which {engine} does not read: vLLM plans its memory by "
            "itself. Remove it, or set `max_num_seqs` in `rollout.vllm.options`."
        )
    if engine == "vllm_server" and servers.max_staleness and reserve_prompts:
        raise ValueError(
            f"`rollout.servers.max_staleness` is 1 and `rollout.reserve_prompts` is {reserve_prompts}: which prompts "
            "replace others is not known before they are sampled. Set one of them to 0."
        )
    if engine == "vllm_server" and not servers.urls:
        raise ValueError("`rollout.engine` is vllm_server, and `rollout.servers.urls` is empty. Name the servers.")
