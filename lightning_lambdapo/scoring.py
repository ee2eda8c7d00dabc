"""Log-probabilities of completions: the decoder once, the output head in chunks of the positions that count."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_lambdapo.functional import chunked_logprobs, logprobs_from_logits
from lightning_lambdapo.packing import MicroBatch
from lightning_lambdapo.parallel import as_forward
from lightning_lambdapo.policy import evaluating


class CompletionScorer:
    """Scores the completion tokens of micro-batches with one model.

    Only positions that predict a completion token reach the output head, and logits exist for one chunk at a time. At
    construction a short input goes through both this path and the model's own forward; where they differ (an
    architecture that does more to its logits than is known here) the model's own logits are used, with one warning.

    Args:
        model: the causal language model.
        temperature: divisor of the logits, that of sampling.
        chunk_size: positions whose logits exist at once.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, chunk_size: int = 1024) -> None:
        self.model = model
        self.temperature = temperature
        self.chunk_size = chunk_size
        self._chunked = as_forward(model, "lambdapo_logprobs", _chunked_forward)
        self._splits = self._probe()

    def __call__(self, micro_batch: MicroBatch) -> Tensor:
        """Log-probabilities ``(n, T')`` of the completion tokens; 0 where masked out."""
        logprobs = self._flat(micro_batch)
        return logprobs.new_zeros(micro_batch.completion_mask.shape).masked_scatter(
            micro_batch.completion_mask, logprobs
        )

    def _flat(self, micro_batch: MicroBatch) -> Tensor:
        if self._splits:
            return self._chunked(micro_batch, self.temperature, self.chunk_size)
        mask = micro_batch.completion_mask
        width = mask.shape[1]
        output = self.model(**_inputs(micro_batch), logits_to_keep=width + 1)
        logits = output.logits[:, -width - 1 : -1][mask]
        return logprobs_from_logits(logits, micro_batch.input_ids[:, -width:][mask], temperature=self.temperature)

    @torch.no_grad()
    def _probe(self) -> bool:
        device = self.model.device
        ids = torch.arange(8, device=device).remainder(self.model.config.get_text_config().vocab_size).view(2, 4)
        mask = torch.ones_like(ids, dtype=torch.bool)
        probe = MicroBatch(
            rows=torch.arange(2, device=device),
            input_ids=ids,
            attention_mask=mask,
            position_ids=mask.long().cumsum(-1) - 1,
            completion_mask=mask[:, 1:],
        )
        self._splits = False
        try:
            with evaluating(self.model):  # dropout would make any two passes differ
                expected = self._flat(probe)
                found = self._chunked(probe, self.temperature, self.chunk_size)
        except (AttributeError, TypeError, RuntimeError) as error:
            reason = str(error)
        else:
            if torch.allclose(found, expected, atol=torch.finfo(self.model.dtype).eps ** 0.5, rtol=0.0):
                return True
            reason = f"log-probabilities differ by up to {(found - expected).abs().max().item():.3g}"
        warnings.warn(
            f"{type(self.model).__name__} cannot be scored in chunks ({reason}); its own forward is used, whose logits "
            "take (rows x completion length x vocabulary) memory.",
            stacklevel=2,
        )
        return False


def _chunked_forward(model: PreTrainedModel, micro_batch: MicroBatch, temperature: float, chunk_size: int) -> Tensor:
    """Log-probabilities ``(M,)`` of the ``M`` completion tokens that count, in row-major order."""
    mask = micro_batch.completion_mask
    width = mask.shape[1]
    hidden = model.get_decoder()(**_inputs(micro_batch)).last_hidden_state
    logprobs, _ = chunked_logprobs(
        hidden[:, -width - 1 : -1][mask],
        micro_batch.input_ids[:, -width:][mask],
        _head(model),
        temperature=temperature,
        chunk_size=chunk_size,
    )
    return logprobs


def _inputs(micro_batch: MicroBatch) -> dict[str, Tensor | bool]:
    return {
        "input_ids": micro_batch.input_ids,
        "attention_mask": micro_batch.attention_mask.long(),
        "position_ids": micro_batch.position_ids,
        "use_cache": False,
    }


def _head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The output head with what the known architectures do to its logits: multiply, divide, cap softly."""
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
