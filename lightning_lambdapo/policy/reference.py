"""The frozen reference: the policy without its adapter, with the adapter it started from, or a copy."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel

from lightning_lambdapo.policy.adapter_options import plain_start
from lightning_lambdapo.policy.model import Policy, causal_lm, evaluating

REFERENCE_ADAPTER = "reference"


def frozen_reference(policy: Policy) -> PreTrainedModel | None:
    """A frozen copy of the policy before training. None if switching the policy's adapter gives the reference.

    An adapter that already changes the policy is kept as a second, frozen adapter. The whole model is copied if
    weights of the base are trained, because no switch restores them.
    """
    if not isinstance(policy, PeftModel):
        return copy.deepcopy(policy).requires_grad_(False)
    if trains_base(policy):
        return copy.deepcopy(causal_lm(policy)).requires_grad_(False)
    if REFERENCE_ADAPTER not in policy.peft_config and _changes_policy(policy):
        keep_initial_adapter(policy)
    return None


def keep_initial_adapter(policy: PeftModel) -> None:
    """Add a frozen copy of the policy's adapter as its reference. The global random state does not change."""
    active = policy.active_adapter
    with torch.random.fork_rng(devices=[]):
        policy.add_adapter(REFERENCE_ADAPTER, plain_start(policy.peft_config[active]))
    weights = get_peft_model_state_dict(policy, adapter_name=active, save_embedding_layers=False)
    set_peft_model_state_dict(policy, weights, adapter_name=REFERENCE_ADAPTER)
    policy.set_adapter(active)


def trains_base(policy: PeftModel) -> bool:
    """True if weights of the base are trained in place, such as its biases."""
    own = (getattr(policy.base_model, "prefix", "prompt_encoder"), "modules_to_save", "trainable_tokens_")
    names = (name for name, parameter in policy.named_parameters() if parameter.requires_grad)
    return any(not any(mark in name for mark in own) for name in names)


def _changes_policy(policy: PeftModel) -> bool:
    """Whether the policy with its adapter differs from the policy without it."""
    layers = [layer for layer in policy.modules() if isinstance(layer, LoraLayer)]
    name = policy.active_adapter
    for layer in layers:
        for first, second in ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)):
            if name in first and all(_has_values(part[name]) for part in (first, second)):
                return True
    return False


def _has_values(part: torch.nn.Module | torch.Tensor) -> bool:
    parameters = [part] if isinstance(part, torch.Tensor) else list(part.parameters())
    return any(bool(parameter.detach().any()) for parameter in parameters)


@contextmanager
def reference_mode(policy: Policy) -> Iterator[None]:
    """Let an adapted policy answer as its reference: adapter off, or the adapter that training started from."""
    if not isinstance(policy, PeftModel):
        raise TypeError("A policy without adapter has no reference mode. Use its frozen copy instead.")
    if REFERENCE_ADAPTER not in policy.peft_config:
        with ExitStack() as off:
            with warnings.catch_warnings():
                # peft says so of any `bias`, and where biases are trained the reference is a copy
                warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
                off.enter_context(policy.disable_adapter())
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
