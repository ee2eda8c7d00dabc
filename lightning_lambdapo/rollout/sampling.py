"""Counter-based sampling: a row's tokens depend on the row's identity, never on the rest of the batch."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.distributed.seeding import STREAMS, random_bits
from lightning_lambdapo.functional.logprobs import entropy_from_softmax, softmax_and_normaliser
from lightning_lambdapo.functional.masking import at_least_float32


def row_uniforms(
    *,
    seed: int,
    stage: str,
    step: int,
    prompt_ids: Sequence[int],
    occurrences: Sequence[int],
    num_samples: int,
    length: int,
    streams: int = STREAMS,
) -> Tensor:
    """Each row's own stream of uniforms, keyed by (seed, stage, step, prompt id, occurrence, sample index).

    Neither the rank nor the row's neighbours enter the key. The same row therefore gets the same numbers however the
    global batch is split. A stream is a prefix of itself at a greater ``length``.

    Args:
        seed: the run's seed.
        stage: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
        step: the module's count of finished training steps. 0 outside fit.
        prompt_ids: ``B`` stable prompt identities.
        occurrences: ``B`` counts of earlier appearances of the same prompt in the global batch.
        num_samples: ``G`` rows per prompt.
        length: ``T`` numbers per row.
        streams: generation of the streams. 1 is that of release 0.1.

    Returns:
        ``(B * G, T)`` float64 on the CPU, in (0, 1].
    """
    draw = {1: _stream_of_release_0_1, 2: _stream}[streams]
    uniforms = torch.empty(len(prompt_ids) * num_samples, length, dtype=torch.float64)
    rows = iter(uniforms)
    for prompt_id, occurrence in zip(prompt_ids, occurrences, strict=True):
        for sample in range(num_samples):
            next(rows).copy_(draw(length, stage, seed, step, prompt_id, occurrence, sample))
    return 1.0 - uniforms


def _stream(length: int, stage: str, *key: int) -> Tensor:
    """Uniforms in [0, 1) with the 53 bits that a float64 holds."""
    return torch.from_numpy((random_bits(length, stage, *key) >> np.uint64(11)) * 2.0**-53)


def _stream_of_release_0_1(length: int, stage: str, *key: int) -> Tensor:
    """The first generation of streams: torch's generator takes only 32 bits of its seed."""
    digest = hashlib.blake2b(struct.pack("<qqqqq", *key) + stage.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(length, dtype=torch.float64, generator=generator)


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    r"""Draw by inversion: the first index ``k`` with :math:`\sum_{i \le k} p_i \ge u \sum_i p_i`.

    With ``u`` in (0, 1] a token of probability zero can never be drawn, not even at either end of the vocabulary.

    Args:
        probabilities: ``(n, V)`` float, at least 0. They need not be normalised.
        uniforms: ``(n,)`` float in (0, 1].

    Returns:
        ``(n,)`` int64. If a row's probabilities are not numbers, the index is arbitrary.

    Example:
        >>> inverse_cdf(torch.tensor([[0.0, 0.5, 0.5, 0.0]]).repeat(3, 1), torch.tensor([1e-12, 0.5, 1.0]))
        tensor([1, 1, 2])
    """
    # torch refuses a float cumsum on CUDA in deterministic mode. The CPU's is deterministic.
    if probabilities.is_cuda and torch.are_deterministic_algorithms_enabled():
        cdf = probabilities.cpu().cumsum(-1).to(probabilities.device)
    else:
        cdf = probabilities.cumsum(-1)
    target = uniforms.to(cdf)[:, None] * cdf[:, -1:]
    # If probabilities are not numbers, there is no such index.
    return torch.searchsorted(cdf, target).squeeze(-1).clamp(max=cdf.shape[-1] - 1)


class TokenSampler:
    """Draws one token per row and step from its own stream, and computes its log-probability and the entropy.

    Nothing that it computes is read back by the host, so that a captured decoding step may call it. The exception is
    sampling on CUDA under ``torch.use_deterministic_algorithms``, see :func:`inverse_cdf`.

    Args:
        config: the sampling settings.
        uniforms: ``(N, T)`` streams of :func:`row_uniforms`.
        prompt_ids: ``(N, P)`` int64, prompt tokens of each row, for the repetition penalty.
        prompt_mask: ``(N, P)`` bool, their mask.
    """

    def __init__(self, config: SamplingConfig, uniforms: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        self.config = config
        self.uniforms = uniforms.to(prompt_ids.device)
        self.warpers: list[Callable[[Any, Tensor], Tensor]] = []
        if config.top_k > 0:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self.warpers.append(TopPLogitsWarper(config.top_p))
        if config.min_p > 0:
            self.warpers.append(MinPLogitsWarper(config.min_p))
        self._prompt = (prompt_ids, prompt_mask) if config.repetition_penalty != 1 else None
        self._seen: Tensor | None = None

    def __call__(self, logits: Tensor, rows: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the token of each row.

        Args:
            logits: ``(n, V)`` of the rows still alive.
            rows: ``(n,)`` int64, their indices among the ``N`` rows.
            step: index of the token within the completion, one for all rows or ``(n,)`` int64.

        Returns:
            Tokens int64, log-probabilities and entropies (float32, or float64 for such logits), each ``(n,)``. The
            last two are those of ``softmax(logits / temperature)`` before any filter.
        """
        logits = at_least_float32(logits)
        temperature = self.config.logprob_temperature
        scaled = logits if temperature == 1 else logits / temperature
        probabilities, normaliser = softmax_and_normaliser(scaled)
        entropy = entropy_from_softmax(scaled, probabilities, normaliser)
        scores = self._penalise(logits, rows)
        if self.config.greedy:
            tokens = scores.argmax(-1)
        elif scores is logits and not self.warpers:
            tokens = inverse_cdf(probabilities, self.uniforms[rows, step])
        else:
            scores = scores / self.config.temperature
            for warper in self.warpers:
                scores = warper(None, scores)
            tokens = inverse_cdf(scores.softmax(-1), self.uniforms[rows, step])
        if self._seen is not None:
            self._seen[rows, tokens] = True
        return tokens, scaled.gather(-1, tokens[:, None]).squeeze(-1) - normaliser, entropy

    def _penalise(self, logits: Tensor, rows: Tensor) -> Tensor:
        if self._prompt is None:
            return logits
        if self._seen is None:  # padding is not "seen", because a row must not depend on the padding of its batch
            ids, mask = self._prompt
            vocabulary = logits.shape[-1]
            seen = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=logits.device)
            seen.scatter_(1, torch.where(mask, ids, vocabulary), True)
            self._seen = seen[:, :vocabulary]
        penalty = self.config.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(self._seen[rows], penalised, logits)
