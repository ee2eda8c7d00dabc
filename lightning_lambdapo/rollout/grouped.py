"""The fast decoder: prompts prefilled once, caches repeated per group, finished rows dropped."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.sampling import SamplingConfig, TokenSampler


class GroupedEngine(RolloutEngine):
    """Own decoding loop over the model's forward.

    Each prompt goes through the model once; its cache is then repeated for the ``G`` rows of its group. Rows that have
    ended leave the batch once they are an eighth of it (selecting rows copies the cache, so not at every ending).
    """

    def generate(
        self, model: PreTrainedModel, batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        """Generate completions; see :meth:`RolloutEngine.generate`."""
        total, max_new_tokens = uniforms.shape
        group_size = total // len(batch.input_ids)
        device = batch.input_ids.device
        mask = batch.attention_mask.long()
        cache = DynamicCache(config=model.config)
        logits = _next_logits(model, batch.input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        if group_size > 1:
            cache.batch_repeat_interleave(group_size)
        logits = logits.repeat_interleave(group_size, 0)
        mask = mask.repeat_interleave(group_size, 0)
        sampler = TokenSampler(sampling, uniforms, batch.input_ids.repeat_interleave(group_size, 0), mask.bool())
        eos = torch.tensor(self.eos_ids, device=device)
        rows = torch.arange(total, device=device)
        alive = torch.ones(total, dtype=torch.bool, device=device)
        ids = torch.full((total, max_new_tokens), self.pad_id, device=device)
        logprobs = torch.zeros(total, max_new_tokens, dtype=_float_type(logits), device=device)
        entropy = torch.zeros_like(logprobs)
        step = 0
        while True:
            tokens, logprobs[rows, step], entropy[rows, step] = sampler(logits, rows, step)
            ids[rows, step] = tokens
            alive &= ~torch.isin(tokens, eos)
            step += 1
            if step == max_new_tokens or not (count := int(alive.sum())):
                break
            if count <= len(alive) * 7 // 8:
                keep = alive.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                rows, tokens, mask, alive = rows[keep], tokens[keep], mask[keep], alive[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            logits = _next_logits(model, tokens[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)
        # Past the last step nothing was drawn: there the padding may not pass for tokens.
        return self.finish(ids[:, :step], logprobs[:, :step], entropy[:, :step])


def _next_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of the token after ``ids``, ``(n, V)``; ``cache`` grows by ``ids``."""
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _float_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
