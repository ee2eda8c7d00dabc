"""Rollouts by a vLLM engine inside the training process."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.config import PolicyConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.engine_settings import VLLMConfig
from lightning_lambdapo.policy.model import Policy
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.vllm.lifetime import live_engine, require_vllm, start_engine, stop_engine
from lightning_lambdapo.rollout.vllm.requests import Answer, requests_for, rollout_of
from lightning_lambdapo.rollout.vllm.weights import (
    adapter_rank,
    base_directory,
    check_servable,
    checkpoint_tensors,
    pack_tied_head,
    write_adapter,
)


class VLLMEngine(RolloutEngine):
    """A vLLM engine with its own copy of the base, in the training process and on its device.

    It starts with the first rollout. LoRA weights are delivered as an adapter under a new id for each version. All
    weights are delivered by vLLM's ``reload_weights``, and what was cached of the old ones is forgotten. Each row has a
    seed of its own, from its own stream of uniforms. The entropy of a rollout is unknown.

    Args:
        tokenizer: decodes the completions.
        eos_ids: every token id that ends a completion.
        pad_id: id written after the end.
        policy: where the base comes from.
        config: the engine's own settings.

    Raises:
        ImportError: vLLM is not installed.
    """

    has_own_weights = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        pad_id: int,
        policy: PolicyConfig,
        config: VLLMConfig = VLLMConfig(),
    ) -> None:
        super().__init__(tokenizer, eos_ids, pad_id)
        require_vllm()
        self.policy_config = policy
        self.config = config
        self._llm: Any = None
        self._deliveries = 0
        self._adapter: Any = None
        self._asleep = False

    def sync(self, policy: Policy, version: int) -> None:
        """Deliver the policy's weights. See :meth:`RolloutEngine.sync`."""
        if not self._runs:
            self._start(policy)
        self._wake()
        if isinstance(policy, PeftModel):
            self._deliver_adapter(policy)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_tensors(policy)})
            if not torch.cuda.is_available():
                self._llm.apply_model(pack_tied_head)
        self._forget_prompts()
        self.version = version

    def generate(
        self, model: PreTrainedModel, batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        """Generate completions. See :meth:`RolloutEngine.generate`."""
        from vllm import SamplingParams

        self._wake()
        requests = requests_for(batch, sampling=sampling, uniforms=uniforms, eos_ids=self.eos_ids)
        with isolate_rng():  # vLLM draws from the process's generators, too, whose numbers belong to learning
            outputs = self._llm.generate(
                [{"prompt_token_ids": request.prompt} for request in requests],
                [SamplingParams(**request.settings) for request in requests],
                use_tqdm=False,
                lora_request=self._adapter,
            )
        answers = []
        for output in outputs:
            tokens = list(output.outputs[0].token_ids)
            found = output.outputs[0].logprobs
            answers.append(Answer(tokens, [each[token].logprob for each, token in zip(found, tokens, strict=True)]))
        return rollout_of(self, answers, length=uniforms.shape[1], device=batch.input_ids.device)

    @property
    def cached_block(self) -> int | None:
        """Block size of vLLM's prefix cache."""
        if not self._runs:
            return None
        cache = self._llm.llm_engine.vllm_config.cache_config
        return int(cache.block_size) if cache.enable_prefix_caching else None

    def sleep(self) -> None:
        """Free the engine's memory, if ``sleep`` says so. Weights of a full policy are delivered again afterwards."""
        if not self._runs or self._asleep or not self._sleeps:
            return
        # Level 1 keeps the base in host memory. Level 2 drops weights that are delivered anew anyway.
        keeps_base = self._adapter is not None
        self._llm.sleep(level=1 if keeps_base else 2)
        self._asleep = True
        if not keeps_base:
            self.version = -1

    def close(self) -> None:
        """Stop the engine. The next :meth:`sync` starts it again."""
        if self._runs:
            stop_engine()
        self._llm = self._adapter = None
        self.version = -1
        self._asleep = False

    @property
    def _runs(self) -> bool:
        return self._llm is not None and self._llm is live_engine()

    @property
    def _sleeps(self) -> bool:
        return torch.cuda.is_available() if self.config.sleep is None else self.config.sleep

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def check(self, policy: Policy) -> None:
        """Refuse what vLLM cannot serve. See :meth:`RolloutEngine.check`."""
        check_servable(policy, self.policy_config)
        if self.config.sleep and not torch.cuda.is_available():
            raise ValueError("`rollout.vllm.sleep` is true, but vLLM sleeps on GPUs alone. Remove the setting.")

    def _start(self, policy: Policy) -> None:
        self.close()
        self.check(policy)
        on_cpu = not torch.cuda.is_available()
        place, revision = base_directory(policy, self.policy_config)
        settings: dict[str, Any] = {
            "model": place,
            "revision": revision,
            "dtype": self.policy_config.dtype,
            "skip_tokenizer_init": True,  # ids in, ids out
            "generation_config": "vllm",  # not the sampling settings that the model's authors recommend
            "logprobs_mode": "processed_logprobs",  # those after the temperature
            "seed": 0,
            "disable_log_stats": True,
            "gpu_memory_utilization": self.config.gpu_memory_utilization,
            "max_model_len": self.config.max_model_len or -1,
            "enforce_eager": on_cpu if self.config.enforce_eager is None else self.config.enforce_eager,
        }
        cache = self.config.kv_cache_gb or (1.0 if on_cpu else None)
        if cache is not None:
            settings["kv_cache_memory_bytes"] = int(cache * 1e9)
        if isinstance(policy, PeftModel):
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter_rank(policy)}
        if self._sleeps:
            settings["enable_sleep_mode"] = True
        self._llm = start_engine(settings | self.config.options)

    def _forget_prompts(self) -> None:
        """Keys and values of prompts that were computed with the old weights."""
        self._llm.reset_prefix_cache()

    def _deliver_adapter(self, policy: PeftModel) -> None:
        from vllm.lora.request import LoRARequest

        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        self._deliveries += 1
        with tempfile.TemporaryDirectory(prefix="lambdapo_", dir=_memory(policy)) as directory:
            write_adapter(policy, Path(directory))
            # vLLM would serve an id that it knows from its cache, whatever the directory holds by now.
            self._adapter = LoRARequest(f"version_{self._deliveries}", self._deliveries, directory)
            self._llm.llm_engine.add_lora(self._adapter)  # read now, so that the files can go


def _memory(policy: PeftModel) -> str | None:
    """Memory that looks like a directory, if the adapter fits well: containers often have little of it."""
    place = "/dev/shm"  # noqa: S108
    size = 4 * sum(each.numel() for each in policy.parameters() if each.requires_grad)
    return place if Path(place).is_dir() and shutil.disk_usage(place).free > 4 * size else None
