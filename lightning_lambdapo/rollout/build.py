"""Which engine generates the rollouts."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.config import PerformanceConfig, PolicyConfig, RolloutConfig
from lightning_lambdapo.policy.loading import eos_token_ids
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.grouped import GroupedEngine
from lightning_lambdapo.rollout.hf import HFEngine


def build_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: PolicyConfig,
    rollout: RolloutConfig,
    performance: PerformanceConfig,
) -> RolloutEngine:
    """The engine that ``rollout.engine`` names."""
    eos_ids = eos_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    arguments = tokenizer, eos_ids, eos_ids[0] if pad_id is None else pad_id
    if rollout.engine == "vllm":
        from lightning_lambdapo.rollout.vllm.engine import VLLMEngine

        return VLLMEngine(*arguments, policy, rollout.vllm)
    if rollout.engine == "vllm_server":
        from lightning_lambdapo.rollout.vllm.servers import VLLMServerEngine

        return VLLMServerEngine(*arguments, policy, rollout.servers)
    if rollout.engine == "hf":
        return HFEngine(*arguments)
    return GroupedEngine(*arguments, rollout, performance)
