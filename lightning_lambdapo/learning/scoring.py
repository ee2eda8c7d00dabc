"""Log-probabilities of completions: one pass of the decoder, and the output head in chunks of positions."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.distributed.fsdp1 import wrapper
from lightning_lambdapo.distributed.parallel import as_forward
from lightning_lambdapo.functional import chunked_logprobs, logprobs_from_logits
from lightning_lambdapo.functional.logprobs import entropy_from_softmax, softmax_and_normaliser
from lightning_lambdapo.functional.masking import at_least_float32
from lightning_lambdapo.learning.packing import MicroBatch
from lightning_lambdapo.policy.attention import branch_attention
from lightning_lambdapo.policy.model import evaluating
from lightning_lambdapo.policy.probing import GROUP_SIZE, OwnLogprobs, ProbeRow, difference, own_logprobs, probe_prompts

_PROBE_LENGTHS = [14, 10, 11, 1]


class CompletionScorer:
    """Computes the log-probabilities of the completion tokens of micro-batches with one model.

    Only positions that predict a completion token reach the output head, and logits exist for one chunk at a time. The
    constructor compares this path with the model's own forward on short inputs, so it must run in the precision of the
    run (under its autocast). If padded rows differ by more than rounding explains (an architecture with an unknown
    change to its logits), the model's own logits are used. If shared prompts differ (an attention that cannot branch),
    padded rows are used. Each case gives one warning.

    Args:
        model: the causal language model.
        temperature: divisor of the logits, that of sampling.
        chunk_size: number of positions whose logits are in memory at once.
        share_prompts: False never packs rows.
        recompute_logits: True computes each chunk's logits again in the backward pass. False computes the gradient
            while they are in memory. A head with trainable parameters always recomputes.

    Attributes:
        share_prompts: whether packed micro-batches are supported.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        chunk_size: int = 1024,
        share_prompts: bool = True,
        recompute_logits: bool = False,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.recompute_logits = recompute_logits or any(
            parameter.requires_grad for parameter in model.get_output_embeddings().parameters()
        )
        self._chunked = as_forward(model, "lambdapo_logprobs", _chunked_forward)
        probe = self._probe_own()
        self._splits = self._probe_head(*probe)
        self.share_prompts = share_prompts and self._probe_packing(*probe)

    def __call__(self, micro_batch: MicroBatch) -> Tensor:
        """Log-probabilities ``(n, T')`` of the completion tokens. 0 where masked out."""
        return self.with_entropy(micro_batch, wanted=False)[0]

    def with_entropy(self, micro_batch: MicroBatch, *, wanted: bool = True) -> tuple[Tensor, Tensor | None]:
        """The same, and the entropies ``(M,)`` in nats of the ``M`` tokens' distributions, without gradient."""
        logprobs, entropy = self._flat(micro_batch, entropy=wanted)
        mask = micro_batch.completion_mask
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs), entropy

    def attention(self) -> AbstractContextManager[None]:
        """The attention of packed micro-batches, for a backward pass that may run the model again."""
        return branch_attention(self.model) if self.share_prompts else nullcontext()

    def _flat(self, micro_batch: MicroBatch, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        with branch_attention(self.model) if micro_batch.branches is not None else nullcontext():
            if self._splits:
                return self._in_chunks(micro_batch, entropy=entropy)
            return self._from_own_logits(micro_batch, entropy=entropy)

    def _in_chunks(self, micro_batch: MicroBatch, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = self._chunked(
            micro_batch, self.temperature, self.chunk_size, self.recompute_logits, entropy
        )
        return found

    def _from_own_logits(self, micro_batch: MicroBatch, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        width = micro_batch.input_ids.shape[1]
        first = int(micro_batch.predictors.remainder(width).min())
        logits = wrapper(self.model)(**_inputs(micro_batch), logits_to_keep=width - first).logits
        row, column = micro_batch.predictors // width, micro_batch.predictors.remainder(width)
        chosen = logits[row, column - first]
        logprobs = logprobs_from_logits(chosen, micro_batch.targets, temperature=self.temperature)
        if not entropy:
            return logprobs, None
        scaled = at_least_float32(chosen.detach()) / self.temperature
        return logprobs, entropy_from_softmax(scaled, *softmax_and_normaliser(scaled))

    @torch.no_grad()
    def _probe_own(self) -> tuple[PromptBatch, Rollout, OwnLogprobs]:
        """Two prompts with ragged completions, 72 tokens of them, and what the model's own forward says of these."""
        prompts = probe_prompts(self.model)
        device, longest, width = prompts[0].device, max(_PROBE_LENGTHS), max(map(len, prompts))
        ids = torch.stack([nn.functional.pad(ids, (width - len(ids), 0)) for ids in prompts])
        mask = torch.arange(width, device=device) >= width - torch.tensor(
            [[len(ids)] for ids in prompts], device=device
        )
        batch = PromptBatch(ids, mask, ids[:, 0], ["", ""], [None, None], [None, None], [{}, {}])
        completions = torch.stack([ids.repeat(2)[i : i + longest] for ids in prompts for i in range(GROUP_SIZE)])
        lengths = torch.tensor(_PROBE_LENGTHS * 2, device=device)
        kept = torch.arange(longest, device=device) < lengths[:, None]
        logprobs = torch.zeros(kept.shape, device=device)
        rollout = Rollout(completions, kept, logprobs, logprobs, lengths == longest, [""] * len(kept))
        rows = [
            ProbeRow(prompts[row // GROUP_SIZE], completions[row, : kept[row].sum()]) for row in range(len(completions))
        ]
        with evaluating(self.model):  # dropout would make any two passes differ
            own = own_logprobs(self.model, rows, temperature=self.temperature, forward=wrapper(self.model))
        return batch, rollout, own

    @torch.no_grad()
    def _probe_head(self, batch: PromptBatch, rollout: Rollout, own: OwnLogprobs) -> bool:
        probe = MicroBatch.padded(batch, rollout, torch.arange(len(rollout.completion_ids), device=own.logprobs.device))
        reason = self._difference(lambda: self._in_chunks(probe)[0], own)
        if reason is not None:
            warnings.warn(
                f"{type(self.model).__name__} cannot compute log-probabilities in chunks ({reason}). Its own forward "
                "is used, whose logits take (rows x completion length x vocabulary) memory.",
                stacklevel=3,
            )
        return reason is None

    @torch.no_grad()
    def _probe_packing(self, batch: PromptBatch, rollout: Rollout, own: OwnLogprobs) -> bool:
        rows = torch.arange(len(rollout.completion_ids), device=own.logprobs.device)
        reason = self._difference(lambda: self._flat(MicroBatch.packed(batch, rollout, rows))[0], own)
        if reason is not None:
            warnings.warn(
                f"{type(self.model).__name__} cannot share prompts in the learning pass ({reason}). Rows are padded "
                "instead, each with its own copy of the prompt. Set `performance.share_prompts_in_learning: false` to "
                "choose that without this message.",
                stacklevel=3,
            )
        return reason is None

    def _difference(self, found: Callable[[], Tensor], own: OwnLogprobs) -> str | None:
        """Why a way does not give the model's own log-probabilities. None if it does."""
        try:
            with evaluating(self.model):
                return difference(found(), own)
        except torch.OutOfMemoryError:  # says nothing about the model
            raise
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            return str(error)


def _chunked_forward(
    model: PreTrainedModel, micro_batch: MicroBatch, temperature: float, chunk_size: int, recompute: bool, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities ``(M,)`` of the ``M`` completion tokens that count, in row-major order, and entropies."""
    hidden = model.get_decoder()(**_inputs(micro_batch)).last_hidden_state
    return chunked_logprobs(
        hidden.flatten(0, 1).index_select(0, micro_batch.predictors),
        micro_batch.targets,
        _head(model),
        temperature=temperature,
        chunk_size=chunk_size,
        entropy=entropy,
        recompute=recompute,
    )


def _inputs(micro_batch: MicroBatch) -> dict[str, Any]:
    inputs = {
        "input_ids": micro_batch.input_ids,
        "attention_mask": micro_batch.attention_mask.long(),
        "position_ids": micro_batch.position_ids,
        "use_cache": False,
    }
    return inputs if micro_batch.branches is None else inputs | {"branches": micro_batch.branches}


def _head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The output head and what known architectures do to its logits: multiply, divide, cap softly."""
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    project = model.get_output_embeddings()

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = project(hidden)
        if scale != 1.0:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return head
