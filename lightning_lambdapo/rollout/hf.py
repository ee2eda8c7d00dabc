"""Rollouts by transformers' own ``generate``: slower, but correct for every architecture it can decode."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.rollout.completion_text import CompletionText
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.sampling import TokenSampler


class HFEngine(RolloutEngine):
    """``generate`` with our sampler as its only logits processor, so that rows use their own streams."""

    exact_logprobs = True

    def generate(
        self, model: PreTrainedModel, batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        """Generate completions. See :meth:`RolloutEngine.generate`."""
        total, max_new_tokens = uniforms.shape
        group_size = total // len(batch.input_ids)
        input_ids = batch.input_ids.repeat_interleave(group_size, 0)
        mask = batch.attention_mask.repeat_interleave(group_size, 0)
        recorder = _SamplingProcessor(TokenSampler(sampling, uniforms, input_ids, mask.bool()))
        stops = [_StopStrings(self.text, input_ids.shape[1])] if self.text.stop_strings else []
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,  # the processor samples
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.pad_id,
        )
        # `generate` fills missing settings from the model's own configuration, which must not count here.
        model_defaults, model.generation_config = model.generation_config, config
        try:
            sequences = cast(Any, model).generate(
                input_ids=input_ids,
                attention_mask=mask.long(),
                generation_config=config,
                logits_processor=LogitsProcessorList([recorder]),
                stopping_criteria=StoppingCriteriaList(stops),
                synced_gpus=False,  # sharded weights are gathered, and ranks decode different numbers of tokens
            )
        finally:
            model.generation_config = model_defaults
        completions = sequences[:, input_ids.shape[1] :]
        return self.finish(completions, torch.stack(recorder.logprobs, -1), torch.stack(recorder.entropy, -1))


class _SamplingProcessor(LogitsProcessor):
    """Samples the token itself, and returns logits that leave ``generate`` only that one."""

    def __init__(self, sampler: TokenSampler) -> None:
        self.sampler = sampler
        self.logprobs: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        tokens, logprobs, entropy = self.sampler(scores, rows, len(self.logprobs))
        self.logprobs.append(logprobs)
        self.entropy.append(entropy)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class _StopStrings(StoppingCriteria):
    """Ends the rows whose completion contains a stop string."""

    def __init__(self, text: CompletionText, prompt_length: int) -> None:
        self.text = text
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([self.text.stops(ids, 1) for ids in rows], device=input_ids.device)
