"""An engine that decodes with its own copy of the policy, as vLLM does, and can be told to fail."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_lambdapo import LambdaPOModule
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.policy.model import Policy, causal_lm
from lightning_lambdapo.rollout import HFEngine


class CopyEngine(HFEngine):
    """Decodes with a copy of the policy. ``broken`` changes what is delivered as version ``at`` and later."""

    exact_logprobs = False
    has_own_weights = True
    broken: str | None = None
    at = 2
    noise = 0.0

    def sync(self, policy: Policy, version: int) -> None:
        self.version = version
        if self.broken == "previous" and version >= self.at:
            return
        self.own = copy.deepcopy(policy).requires_grad_(False)
        if self.broken == "base" and version >= self.at:
            for name, parameter in self.own.named_parameters():
                if "lora_B" in name:
                    nn.init.zeros_(parameter)

    def generate(self, model: PreTrainedModel, batch: PromptBatch, **settings: Any) -> Rollout:
        rollout = super().generate(causal_lm(self.own), batch, **settings)
        generator = torch.Generator().manual_seed(self.version)
        error = torch.randn(rollout.sampling_logprobs.shape, generator=generator) * self.noise
        noisy = (rollout.sampling_logprobs + error).where(rollout.completion_mask, 0)
        return Rollout(rollout.completion_ids, rollout.completion_mask, noisy, None, rollout.truncated, rollout.texts)


class CopyModule(LambdaPOModule):
    broken: str | None = None
    noise: float = 0.0

    def build_engine(self, model: PreTrainedModel) -> CopyEngine:
        engine = CopyEngine(self.tokenizer, (1,), 0)
        engine.broken, engine.noise = self.broken, self.noise
        return engine
