"""The policy and the ways into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lightning_lambdapo.distributed.fsdp1 import unwrapped

Policy = PreTrainedModel | PeftModel


def causal_lm(policy: Policy) -> PreTrainedModel:
    """The causal language model itself, adapter layers and all, without peft's or a strategy's outer wrapper."""
    return cast(PreTrainedModel, unwrapped(policy.get_base_model() if isinstance(policy, PeftModel) else policy))


def with_causal_lm(policy: Policy, model: nn.Module) -> Policy:
    """The policy with something else in the place of its causal language model."""
    if not isinstance(policy, PeftModel):
        return cast(Policy, model)
    policy.base_model.model = model
    return policy


@contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Eval mode for the duration: in train mode with gradient checkpointing, decoding silently yields wrong tokens."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)
