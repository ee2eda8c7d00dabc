"""The policy: loading, reference, adapters, attention, kernels."""

from lightning_lambdapo.config import AdapterConfig, PolicyConfig
from lightning_lambdapo.policy.loading import eos_token_ids, load_policy, load_tokenizer, save_policy
from lightning_lambdapo.policy.model import Policy, causal_lm, evaluating
from lightning_lambdapo.policy.reference import frozen_reference, reference_mode

__all__ = [
    "AdapterConfig",
    "Policy",
    "PolicyConfig",
    "causal_lm",
    "eos_token_ids",
    "evaluating",
    "frozen_reference",
    "load_policy",
    "load_tokenizer",
    "reference_mode",
    "save_policy",
]
