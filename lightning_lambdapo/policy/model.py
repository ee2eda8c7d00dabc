"""The policy, its causal language model, and its eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lightning_lambdapo.distributed.fsdp1 import unwrapped

Policy = PreTrainedModel | PeftModel


def causal_lm(policy: Policy) -> PreTrainedModel:
    """The causal language model with its adapter layers, without the outer wrapper of peft or a strategy."""
    return cast(PreTrainedModel, unwrapped(policy.get_base_model() if isinstance(policy, PeftModel) else policy))


def with_causal_lm(policy: Policy, model: nn.Module) -> Policy:
    """The policy with ``model`` in place of its causal language model."""
    if not isinstance(policy, PeftModel):
        return cast(Policy, model)
    policy.base_model.model = model
    return policy


@contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Eval mode inside this context. In train mode, gradient checkpointing makes decoding silently wrong."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)
