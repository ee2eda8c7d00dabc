"""Whether a faster way to log-probabilities is right: compared with the model's own forward, and with its rounding.

Rounding alone makes the own forward differ from itself: when rows are padded together, and when another kernel computes
the attention. A faster way may differ from single rows by one and a half times as much, on average. A structural error
(a wrong mask, window, position or soft cap) differs by more.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_lambdapo.functional import logprobs_from_logits

GROUP_SIZE = 4
_PERIODS, _PROMPTS = (4, 6), (11, 16)
_FACTOR, _LEAST = 1.5, 1e-4


class ProbeRow(NamedTuple):
    """A prompt ``(p,)`` and its completion ``(c,)``, both int64."""

    prompt: Tensor
    completion: Tensor


class OwnLogprobs(NamedTuple):
    """What the model's own forward says of some rows.

    Attributes:
        logprobs: ``(M,)`` of all completion tokens, row by row, each row alone.
        noise: the largest mean absolute difference between two ways to compute them.
        dtype: the least precise type of the computation.
    """

    logprobs: Tensor
    noise: float
    dtype: torch.dtype

    @property
    def allowed(self) -> float:
        """The largest mean absolute difference that rounding explains.

        One and a half times the noise, at least 1e-4 or one rounding step of the type. At most 0.02, or 0.2 in 16 bits,
        because the model's own ways may be at odds for another reason than rounding.
        """
        eps = torch.finfo(self.dtype).eps
        return min(max(_FACTOR * self.noise, eps, _LEAST), 0.02 if eps < 1e-4 else 0.2)


def probe_prompts(model: PreTrainedModel) -> list[Tensor]:
    """Two prompts of 11 and 16 tokens, each a few random tokens that repeat.

    A trained model continues a repetition by attending to exact places, which makes it sensitive to errors there.
    """
    vocabulary = model.config.get_text_config().vocab_size
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(3, vocabulary - 1), vocabulary, (sum(_PERIODS),), generator=source)
    parts = tokens.split(_PERIODS)
    return [
        part.repeat(-(-size // len(part)))[:size].to(model.device) for part, size in zip(parts, _PROMPTS, strict=True)
    ]


@torch.no_grad()
def own_logprobs(
    model: PreTrainedModel,
    rows: Sequence[ProbeRow],
    *,
    temperature: float = 1.0,
    forward: Callable[..., Any] | None = None,
) -> OwnLogprobs:
    """Log-probabilities of the completions by the model's own forward, in several ways.

    Each row alone, all padded on the right, all padded on the left, and these under another attention implementation if
    the model has one. Call it in the precision of the run (autocast), with the model in eval mode.

    Args:
        model: the causal language model.
        rows: prompts with completions.
        temperature: divisor of the logits.
        forward: calls the model. None calls it directly.
    """
    call = model if forward is None else forward

    def together(members: Sequence[ProbeRow], *, left: bool) -> tuple[Tensor, torch.dtype]:
        width = max(len(row.prompt) + len(row.completion) for row in members)
        ids = members[0].prompt.new_zeros(len(members), width)
        mask = torch.zeros_like(ids)
        places = []
        for index, row in enumerate(members):
            size = len(row.prompt) + len(row.completion)
            start = width - size if left else 0
            ids[index, start : start + size] = torch.cat(row)
            mask[index, start : start + size] = 1
            places.append(slice(start + len(row.prompt) - 1, start + size - 1))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = call(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        found = [
            logprobs_from_logits(logits[index, place], row.completion, temperature=temperature)
            for index, (row, place) in enumerate(zip(members, places, strict=True))
        ]
        return torch.cat(found), logits.dtype

    alone = [together([row], left=False) for row in rows]
    ways = [torch.cat([logprobs for logprobs, _ in alone])]
    ways += [together(rows, left=left)[0] for left in (False, True)]
    try:
        with _other_attention(model):
            ways += [together(rows, left=left)[0] for left in (False, True)]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, RuntimeError):
        pass  # the model has no other
    noise = max((one - other).abs().mean().item() for one in ways for other in ways)
    return OwnLogprobs(ways[0], noise, _coarsest(model, alone[0][1]))


def difference(found: Tensor, own: OwnLogprobs) -> str | None:
    """Why ``found``, ``(M,)``, is not what the model's own forward says. None if rounding explains the difference."""
    mean = (found.double() - own.logprobs.double()).abs().mean().item()
    if mean <= own.allowed:  # not so for NaN
        return None
    return f"log-probabilities differ by {mean:.2g} on average, and rounding explains {own.allowed:.2g}"


@contextmanager
def _other_attention(model: PreTrainedModel) -> Any:
    before = model.config._attn_implementation
    model.config._attn_implementation = "sdpa" if before == "eager" else "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _coarsest(model: PreTrainedModel, logits: torch.dtype) -> torch.dtype:
    """The least precise type among those of weights, logits and autocast."""
    kinds = [logits, model.dtype]
    if torch.is_autocast_enabled(model.device.type):
        kinds.append(torch.get_autocast_dtype(model.device.type))
    return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: torch.finfo(kind).eps)
