"""The frozen reference: the policy without its adapter, with the adapter it started from, or a copy."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel

from lightning_lambdapo.policy.model import Policy, evaluating

REFERENCE_ADAPTER = "reference"


def frozen_reference(policy: Policy) -> PreTrainedModel | None:
    """A frozen copy of a policy whose weights are all trained. None if switching the adapter gives the reference."""
    if isinstance(policy, PeftModel):
        return None
    return copy.deepcopy(policy).requires_grad_(False)


@contextmanager
def reference_mode(policy: Policy) -> Iterator[None]:
    """Let an adapted policy answer as its reference: adapter off, or the adapter that training started from."""
    if not isinstance(policy, PeftModel):
        raise TypeError("A policy without adapter has no reference mode. Use its frozen copy instead.")
    if REFERENCE_ADAPTER not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    active = policy.active_adapter
    tuner = cast(BaseTuner, policy.base_model)
    tuner.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
    try:
        yield
    finally:
        tuner.set_adapter(active)


@contextmanager
def answering_as_reference(policy: Policy, reference: PreTrainedModel | None) -> Iterator[None]:
    """Let the policy answer as it was before training, in eval mode.

    Args:
        policy: the policy that is trained.
        reference: its frozen copy. None if switching the policy's adapter gives the reference.
    """
    with evaluating(policy if reference is None else reference):
        if reference is not None:
            yield
            return
        with reference_mode(policy):
            yield
