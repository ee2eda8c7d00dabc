"""What vLLM is asked for, and how its answers become a rollout."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.rollout.engine import RolloutEngine


class Request(NamedTuple):
    """One completion to sample.

    Attributes:
        prompt: token ids, without padding.
        settings: arguments of vLLM's ``SamplingParams``.
    """

    prompt: list[int]
    settings: dict[str, Any]


class Answer(NamedTuple):
    """A sampled completion: its token ids, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def row_seeds(uniforms: Tensor) -> list[int]:
    """A seed for each row, from the start of its own stream.

    A row therefore gets the same seed when a run is resumed, and on any number of ranks.

    Args:
        uniforms: ``(N, T)`` float64, the rows' streams.

    Returns:
        ``N`` integers from 0 to 2^53.

    Example:
        >>> row_seeds(torch.tensor([[0.5, 0.1], [1.0, 0.1]], dtype=torch.float64)) == [2**52, 2**53]
        True
    """
    return [int(first * 2**53) for first in uniforms[:, 0].tolist()]


def requests_for(
    batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor, eos_ids: Sequence[int]
) -> list[Request]:
    """One request for each row, in group-major order."""
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)]
    group_size = len(uniforms) // len(prompts)
    shared = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": uniforms.shape[1],
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,  # those of vLLM's own tokenizer, because ours are above
        "detokenize": False,
        "logprobs": 0,  # that of the sampled token alone
    }
    seeds = row_seeds(uniforms)
    return [Request(prompts[row // group_size], {**shared, "seed": seed}) for row, seed in enumerate(seeds)]


def rollout_of(engine: RolloutEngine, answers: Sequence[Answer], *, length: int, device: torch.device) -> Rollout:
    """The rollout of all rows.

    Args:
        engine: masks and decodes.
        answers: of all rows, in order.
        length: the largest number of new tokens.
        device: device of the rollout.

    Raises:
        RuntimeError: a row ended early without an end-of-sequence token.
    """
    ends = set(engine.eos_ids)
    for row, (tokens, logprobs) in enumerate(answers):
        if not tokens or len(tokens) != len(logprobs) or (len(tokens) < length and tokens[-1] not in ends):
            raise RuntimeError(
                f"vLLM ended row {row} after {len(tokens)} of {length} tokens with no end-of-sequence token "
                f"({len(logprobs)} log-probabilities). Its `max_model_len` is too small for this prompt: raise "
                "`rollout.vllm.max_model_len` (or the server's), or lower `max_new_tokens`."
            )
    ids = torch.full((len(answers), length), engine.pad_id, dtype=torch.long)
    values = torch.zeros(len(answers), length)
    for row, (tokens, logprobs) in enumerate(answers):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        values[row, : len(tokens)] = torch.tensor(logprobs)
    return engine.finish(ids.to(device), values.to(device), None)
