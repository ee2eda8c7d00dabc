"""The fast decoder: prompts are stored once, finished rows make room, and waiting prompts fill it."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.config import PerformanceConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.policy.attention import UnsupportedAttentionError, branch_attention
from lightning_lambdapo.policy.lora import merged_adapter
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.hf import HFEngine
from lightning_lambdapo.rollout.kv_store import GroupStore
from lightning_lambdapo.rollout.sampling import TokenSampler, row_uniforms


class GroupedEngine(RolloutEngine):
    """A decoding loop over the model's forward, with attention over :class:`GroupStore`.

    Each prompt goes through the model once and is stored once, whatever its number of rows. A finished row is removed
    at once. With ``max_live_tokens`` the next prompts start as soon as there is room, so that one long row does not
    delay the others. Before its first rollout the engine decodes a few tokens of two short prompts, and compares their
    log-probabilities with those of the model's own forward. If they differ, or if the architecture has layers other
    than attention over earlier tokens, :class:`HFEngine` is used instead, with one warning.

    Args:
        tokenizer: decodes the completions.
        eos_ids: every token id that ends a completion.
        pad_id: id written after the end.
        config: the engine reads ``max_live_tokens``. A single prompt's rows are never split.
        performance: the engine's switches. For ``merge_adapter`` see :func:`merged_adapter`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        pad_id: int,
        config: RolloutConfig = RolloutConfig(),
        performance: PerformanceConfig = PerformanceConfig(),
    ) -> None:
        super().__init__(tokenizer, eos_ids, pad_id)
        self.config = config
        self.performance = performance
        self._fallback: HFEngine | None = None
        self._probed = False

    def generate(
        self, model: PreTrainedModel, batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        """Generate completions. See :meth:`RolloutEngine.generate`."""
        if not self._probed:
            self._probe(model)
        if self._fallback is not None:
            return self._fallback.generate(model, batch, sampling=sampling, uniforms=uniforms)
        with merged_adapter(model, self.performance.merge_adapter):
            return self._decode(model, batch, sampling, uniforms)

    def _decode(
        self, model: PreTrainedModel, batch: PromptBatch, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        total, max_new_tokens = uniforms.shape
        group_size = total // len(batch.input_ids)
        device = batch.input_ids.device
        prompts = [ids[mask] for ids, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)]
        sampler = TokenSampler(
            sampling,
            uniforms,
            batch.input_ids.repeat_interleave(group_size, 0),
            batch.attention_mask.bool().repeat_interleave(group_size, 0),
        )
        if not self.performance.share_prompts_in_rollouts:
            prompts, group_size = [ids for ids in prompts for _ in range(group_size)], 1
        store = GroupStore(device)
        live = _LiveRows(self.eos_ids, self.pad_id, total, max_new_tokens, model)
        waiting = 0
        with branch_attention(model):
            while waiting < len(prompts) or len(store):
                admitted = self._admissible(prompts[waiting:], group_size, max_new_tokens, store)
                if admitted:
                    new = prompts[waiting : waiting + admitted]
                    prefill = store.admit(list(map(len, new)), group_size)
                    ends = torch.tensor(prefill.prompts, device=device).cumsum(0) - 1
                    logits = _logits(model, torch.cat(new)[None], prefill.position_ids, prefill, ends)[0]
                    logits = logits.repeat_interleave(group_size, 0)
                    rows = torch.arange(waiting * group_size, (waiting + admitted) * group_size, device=device)
                    which = live.add(rows)
                    waiting += admitted
                else:
                    store.begin_step()
                    logits = _logits(model, live.tokens[:, None], store.position_ids, store, 0)[:, 0]
                    store.end_step()
                    which = slice(None)
                live.write(which, sampler(logits, live.rows[which], live.steps[which]))
                left = int(live.alive.sum())
                if left < len(store) and (self.performance.compaction or not left):
                    live.select(store.keep(live.alive))
        return self.finish(live.ids, live.logprobs, live.entropy)

    def _admissible(self, waiting: list[Tensor], group_size: int, max_new_tokens: int, store: GroupStore) -> int:
        """Number of waiting prompts that can start now."""
        if self.config.max_live_tokens is None:
            return len(waiting)
        room = self.config.max_live_tokens - int(store.prompt_lengths.sum()) - len(store) * max_new_tokens
        count = 0
        for ids in waiting:
            room -= len(ids) + group_size * max_new_tokens
            if room < 0 and (count or len(store)):
                break
            count += 1
        return count

    @torch.no_grad()
    def _probe(self, model: PreTrainedModel) -> None:
        """Decode two short prompts, and fall back if the model's own forward disagrees."""
        self._probed = True
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.arange(2, 8, device=model.device).remainder(vocabulary).view(2, 3)
        mask = torch.tensor([[False, True, True], [True, True, True]], device=model.device)
        batch = PromptBatch(ids, mask, torch.arange(2), ["", ""], [None, None], [None, None], [{}, {}])
        uniforms = row_uniforms(
            seed=0, stage="probe", step=0, prompt_ids=[0, 1], occurrences=[0, 0], num_samples=2, length=4
        )
        ends, self.eos_ids = self.eos_ids, (-1,)  # nothing ends the probe early
        try:
            found = self._decode(model, batch, SamplingConfig(), uniforms)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            reason = str(error) if isinstance(error, UnsupportedAttentionError) else f"{type(error).__name__}: {error}"
        else:
            worst = rounding = 0.0
            for row, completion in enumerate(found.completion_ids):
                tokens = torch.cat([ids[row // 2][mask[row // 2]], completion])
                logits = model(input_ids=tokens[None], use_cache=False).logits[0, -len(completion) - 1 : -1]
                rounding = torch.finfo(logits.dtype).eps ** 0.5  # also under mixed precision
                expected = logits.double().log_softmax(-1).gather(-1, completion[:, None]).squeeze(-1)
                worst = max(worst, (expected - found.sampling_logprobs[row]).abs().max().item())
            if worst < 2 * rounding:
                return
            reason = f"its log-probabilities would be off by {worst:.2g}"
        finally:
            self.eos_ids = ends
        warnings.warn(
            f"{type(model).__name__} cannot be decoded by the grouped engine ({reason}). The slower generate of "
            "transformers is used instead. Set `rollout.engine: hf` to choose it without this message.",
            stacklevel=2,
        )
        self._fallback = HFEngine(self.tokenizer, self.eos_ids, self.pad_id)


class _LiveRows:
    """The tokens sampled so far, and the ``n`` rows still being decoded, in the order of the store.

    Attributes:
        rows: ``(n,)`` int64, their indices among all rows.
        steps: ``(n,)`` int64, index of the token that each row samples next.
        tokens: ``(n,)`` int64, the last token sampled.
        alive: ``(n,)`` bool, False once a row has ended.
    """

    def __init__(self, eos_ids: Sequence[int], pad_id: int, total: int, length: int, model: PreTrainedModel) -> None:
        device = model.device
        self.eos = torch.tensor(eos_ids, device=device)
        self.ids = torch.full((total, length), pad_id, device=device)
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.logprobs, self.entropy = (torch.zeros(total, length, dtype=dtype, device=device) for _ in range(2))
        self.rows = self.steps = self.tokens = torch.zeros(0, dtype=torch.long, device=device)
        self.alive = torch.zeros(0, dtype=torch.bool, device=device)

    def add(self, rows: Tensor) -> slice:
        """Add new rows. Returns where their first tokens are to be written."""
        count = len(self.rows)
        self.rows = torch.cat([self.rows, rows])
        self.steps = torch.cat([self.steps, torch.zeros_like(rows)])
        self.tokens = torch.cat([self.tokens, torch.zeros_like(rows)])
        self.alive = torch.cat([self.alive, torch.ones_like(rows, dtype=torch.bool)])
        return slice(count, None)

    def write(self, which: slice, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
        """Write one token of each of these rows, with its log-probability and entropy."""
        steps, alive = self.steps[which], self.alive[which]
        place = self.rows[which][alive], steps[alive]
        self.ids[place], self.logprobs[place], self.entropy[place] = (values[alive] for values in drawn)
        self.tokens[which] = drawn[0]
        last = self.ids.shape[1] - 1
        self.alive[which] &= ~torch.isin(drawn[0], self.eos) & (steps < last)
        self.steps[which] = (steps + 1).clamp(max=last)

    def select(self, order: Tensor) -> None:
        """Keep the rows at these indices, in this order."""
        self.rows, self.steps, self.tokens, self.alive = (
            states[order] for states in (self.rows, self.steps, self.tokens, self.alive)
        )


def _logits(model: PreTrainedModel, ids: Tensor, positions: Tensor, branches: Any, keep: int | Tensor) -> Tensor:
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        use_cache=False,
        logits_to_keep=keep,
        branches=branches,
    )
    logits: Tensor = output.logits
    return logits
