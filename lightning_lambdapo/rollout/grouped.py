"""The fast decoder: prompts are stored once, finished rows make room, and waiting prompts fill it."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.config import PerformanceConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.distributed.parallel import has_shards
from lightning_lambdapo.policy.attention import UnsupportedAttentionError, branch_attention
from lightning_lambdapo.policy.decoding import decoding_weights
from lightning_lambdapo.policy.probing import GROUP_SIZE, ProbeRow, difference, own_logprobs, probe_prompts
from lightning_lambdapo.rollout.completion_text import CompletionText
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.hf import HFEngine
from lightning_lambdapo.rollout.kv_store import GroupStore
from lightning_lambdapo.rollout.live_rows import LiveRows
from lightning_lambdapo.rollout.sampling import TokenSampler, row_uniforms
from lightning_lambdapo.rollout.step_runner import Capture, CudaCapture, StepRunner

_POLL_EVERY = 16


class GroupedEngine(RolloutEngine):
    """A decoding loop over the model's forward, with attention over :class:`GroupStore`.

    Each prompt goes through the model once and is stored once, whatever its number of rows. All state is in tensors
    that a decoding step changes in place, so that the host need not wait for the device. Only a poll reads which rows
    have ended. Ended rows are then removed, and with ``max_live_tokens`` the next prompts start if there is room, so
    that one long row does not delay the others. A row that ends between polls continues decoding, which changes neither
    its own tokens nor those of others. Before its first rollout the engine decodes a few tokens of two short prompts,
    and compares their log-probabilities with those of the model's own forward. If they differ, or if the architecture
    has layers other than attention over earlier tokens, :class:`HFEngine` is used instead, with one warning.

    Args:
        tokenizer: decodes the completions.
        eos_ids: every token id that ends a completion.
        pad_id: id written after the end.
        config: the engine reads ``max_live_tokens``. A single prompt's rows are never split.
        performance: the engine's switches. For ``merge_adapter`` see :func:`decoding_weights`, for ``cuda_graphs``
            :class:`StepRunner`.
        poll_every: tokens from one poll to the next. None polls at every token on a CPU, where a read costs nothing,
            and at every 16th elsewhere. When a row has its last possible token there is a poll, too.
    """

    exact_logprobs = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        pad_id: int,
        config: RolloutConfig = RolloutConfig(),
        performance: PerformanceConfig = PerformanceConfig(),
        poll_every: int | None = None,
    ) -> None:
        super().__init__(tokenizer, eos_ids, pad_id)
        self.config = config
        self.performance = performance
        self.poll_every = poll_every
        self._fallback: HFEngine | None = None
        self._probed = False

    def generate(
        self, model: PreTrainedModel, batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        """Generate completions. See :meth:`RolloutEngine.generate`."""
        if not self._probed:
            self._probe(model)
            self._probed = True
        if self._fallback is not None:
            return self._fallback.generate(model, batch, sampling=sampling, uniforms=uniforms)
        with decoding_weights(model, self.performance):
            return self._decode(model, batch, sampling, uniforms)

    def _decode(
        self, model: PreTrainedModel, batch: PromptBatch, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        total, length = uniforms.shape
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
        budget = self.config.max_live_tokens
        capacity = total if budget is None else max(group_size, min(total, budget // length))
        dtype = torch.promote_types(model.dtype, torch.float32)
        live = LiveRows(self.eos_ids, self.pad_id, (total, length), capacity, dtype, device)
        capture = self._capture(model, device)
        store = GroupStore(
            device,
            rows=capacity,
            length=length,
            group_size=group_size,
            prompt_width=max(map(len, prompts)),
            rounded=capture is not None,
        )

        def step() -> None:
            logits = _logits(model, live.tokens[:, None], store.position_ids, store, 0)[:, 0]
            store.end_step()
            live.write(slice(None), sampler(logits, live.rows, live.steps))

        runner = StepRunner(store, step, capture)
        interval = self.poll_every or (1 if device.type == "cpu" else _POLL_EVERY)
        waiting = 0
        with branch_attention(model):
            while True:  # each turn begins with a poll: the only read of the device and change of who is live
                if self.text.stop_strings:
                    self._stop(live, interval)
                alive: list[bool] = live.alive.tolist()
                oldest = max((size for size, going in zip(store.sizes, alive, strict=True) if going), default=0)
                kept = alive if self.performance.compaction else [any(alive)] * len(alive)
                admitted = self._admissible(prompts[waiting:], group_size, length, *store.held(kept))
                if not admitted and not any(kept):
                    break
                kept = store.rounded_up(kept, admitted * group_size)
                if not all(kept):
                    live.select(store.keep(kept))
                steps = min(interval, length - 1 - oldest)  # a row that has its last token ends a round, too
                if admitted:
                    new = prompts[waiting : waiting + admitted]
                    prefill = store.admit(list(map(len, new)), group_size)
                    ends = torch.tensor(prefill.prompts, device=device).cumsum(0) - 1
                    logits = _logits(model, torch.cat(new)[None], prefill.position_ids, prefill, ends)[0]
                    logits = logits.repeat_interleave(group_size, 0)
                    rows = torch.arange(waiting * group_size, (waiting + admitted) * group_size, device=device)
                    live.write(live.add(rows), sampler(logits, rows, 0))
                    waiting += admitted
                    steps = min(interval - 1, steps)
                for _ in range(steps):
                    runner()
        return self.finish(*live.recorded)

    def _stop(self, live: LiveRows, new: int) -> None:
        """End the rows whose last ``new`` tokens complete a stop string. What they have after it is cut off at the end.

        A row's tokens are read at polls alone, as all else is.
        """
        ids = live.recorded[0][live.rows].tolist()
        seen = zip(ids, live.steps.tolist(), live.alive.tolist(), strict=True)
        going = [alive and not self.text.stops(row[:count], new) for row, count, alive in seen]
        live.alive.copy_(torch.tensor(going, device=live.alive.device))

    def _admissible(self, waiting: list[Tensor], group_size: int, length: int, rows: int, tokens: int) -> int:
        """Number of waiting prompts that can start now, beside ``rows`` rows with ``tokens`` tokens of prompts."""
        if self.config.max_live_tokens is None:
            return len(waiting)
        room = self.config.max_live_tokens - tokens - rows * length
        count = 0
        for ids in waiting:
            room -= len(ids) + group_size * length
            if room < 0 and (count or rows):
                break
            count += 1
        return count

    def _capture(self, model: PreTrainedModel, device: torch.device) -> Capture | None:
        """What records decoding steps, if anything does."""
        wanted = self.performance.cuda_graphs
        if wanted is None:
            # Sharded weights come and go, and deterministic sampling copies to the host.
            deterministic = torch.are_deterministic_algorithms_enabled()
            wanted = device.type == "cuda" and not deterministic and not has_shards(model)
        return CudaCapture(device) if wanted else None

    @torch.no_grad()
    def _probe(self, model: PreTrainedModel) -> None:
        """Decode 80 tokens after two short prompts. Fall back if the model's own forward disagrees beyond rounding."""
        prompts = probe_prompts(model)
        width = max(map(len, prompts))
        ids = torch.stack([nn.functional.pad(each, (width - len(each), 0)) for each in prompts])
        mask = torch.stack([nn.functional.pad(torch.ones_like(each), (width - len(each), 0)) for each in prompts])
        batch = PromptBatch(ids, mask.bool(), torch.arange(2), ["", ""], [None, None], [None, None], [{}, {}])
        uniforms = row_uniforms(
            seed=0, stage="probe", step=0, prompt_ids=[0, 1], occurrences=[0, 0], num_samples=GROUP_SIZE, length=10
        )
        ends, self.eos_ids, text, self.text = self.eos_ids, (-1,), self.text, CompletionText(self.tokenizer)
        reason: str | None
        try:
            found = self._decode(model, batch, SamplingConfig(), uniforms)
        except torch.OutOfMemoryError:  # says nothing about the model, and the rollout may be retried
            raise
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            reason = str(error) if isinstance(error, UnsupportedAttentionError) else f"{type(error).__name__}: {error}"
        else:
            rows = [ProbeRow(prompts[row // GROUP_SIZE], each) for row, each in enumerate(found.completion_ids)]
            reason = difference(found.sampling_logprobs.flatten(), own_logprobs(model, rows))
            if reason is None:
                return
        finally:
            self.eos_ids, self.text = ends, text
        warnings.warn(
            f"{type(model).__name__} cannot be decoded by the grouped engine ({reason}). The slower generate of "
            "transformers is used instead. Set `rollout.engine: hf` to choose it without this message.",
            stacklevel=2,
        )
        self._fallback = HFEngine(self.tokenizer, self.eos_ids, self.pad_id)
        self._fallback.text = self.text


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
