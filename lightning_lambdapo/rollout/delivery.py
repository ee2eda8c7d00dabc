r"""Whether an engine with its own copy of the weights has sampled from the current ones.

The sampled tokens' log-probabilities :math:`s` come from the engine. The policy computes the same tokens'
:math:`c` with its current weights, and :math:`h` as it would be if delivery had failed in some way: with the weights
before the last update, without the adapter, or with prompts that were cached under the weights before. :math:`s` is
nearer to :math:`c` if delivery worked, and nearer to :math:`h` if it failed that way. With the product

.. math:: p = \left(s - \frac{c + h}{2}\right) (h - c)

the share

.. math:: \beta = \frac{1}{2} + \frac{\sum p}{\sum (h - c)^2}

is near 0 or near 1. Each of s, c and h is rounded. That of c and h counts in both factors, but p changes its sign if c
and h change places, so equal rounding of both draws the share to 1/2 and to neither side. And

.. math:: z = \frac{\sum p}{\sqrt{\sum p^2}}

says whether the share is known. Where signs are independent, z exceeds t with a probability of at most
:math:`e^{-t^2 / 2}`, however heavy the tails (Efron 1969, "Student's t-test under symmetry conditions"). Sums continue
over rollouts, because one small update in 16 bits is below the rounding of a single one.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.distributed.fsdp1 import wrapper
from lightning_lambdapo.distributed.parallel import gather_objects
from lightning_lambdapo.functional import logprobs_from_logits
from lightning_lambdapo.policy.model import Policy, causal_lm
from lightning_lambdapo.policy.versions import fingerprint, other_weights, trained_tensors

_ROWS, _TOKENS, _TOKENS_OF_A_ROW = 16, 512, 128
#: A share of 0.65 leaves room for c and h that are rounded unequally, as with an adapter and without.
_KNOWN, _SHARE, _DECAY, _ALIKE = 6.0, 0.65, 0.9, 48
_FAILURES = {
    "base": "the base model without the adapter",
    "previous": "the weights before the last update",
    "prompts": "prompts that were cached under the weights before the last update (a prefix cache that was not reset)",
}


class DeliveryError(RuntimeError):
    """An engine has sampled from other weights than the policy's."""


@dataclass
class Evidence:
    """Sums over tokens for one way in which delivery may have failed. See the module's docstring.

    Attributes:
        remainder: the part of the last rollout's difference, in squares, that this way does not explain.
    """

    product: float = 0.0
    product_square: float = 0.0
    square: float = 0.0
    remainder: float = math.inf

    def add(self, error: Tensor, difference: Tensor) -> None:
        """Add the tokens of a rollout: ``s - c`` and ``h - c``, both ``(M,)``. Earlier ones count less.

        Both are clamped to the 48th largest value, so that a few tokens cannot outweigh the others.
        """
        whole = error.square().sum().item()
        self.remainder = (error - difference).square().sum().item() / whole if whole else math.inf
        count = min(_ALIKE, len(error))
        if not count:
            return
        largest = max(values.abs().topk(count).values[-1].item() for values in (error, difference))
        error, difference = error.clamp(-largest, largest), difference.clamp(-largest, largest)
        product = (error - difference / 2) * difference
        self.product = _DECAY * self.product + product.sum().item()
        self.product_square = _DECAY * self.product_square + product.square().sum().item()
        self.square = _DECAY * self.square + difference.square().sum().item()

    @property
    def share(self) -> float:
        """The share of the difference that the engine shows: 0 if it has the current weights, 1 if not."""
        return 0.5 + self.product / self.square if self.square else 0.0

    @property
    def deviations(self) -> float:
        """How many standard errors the sum is above 0."""
        return self.product / math.sqrt(self.product_square) if self.product_square else 0.0

    @property
    def convicts(self) -> bool:
        """True if the engine is known to have sampled in this way."""
        return self.share > _SHARE and self.deviations > _KNOWN


class Delivery:
    """Counts the versions of the policy's trained weights, and checks each version's first rollout.

    Attributes:
        version: number of the current weights, from 1.
        evidence: what is known of each way to fail.
        drift: mean absolute difference of log-probabilities in the last check, in nats per token.
    """

    def __init__(self) -> None:
        self.version = 0
        self.evidence = {name: Evidence() for name in _FAILURES}
        self.drift = math.nan
        self._fingerprint: tuple[int, ...] | None = None
        self._current: Mapping[str, Tensor] = {}
        self._previous: Mapping[str, Tensor] | None = None
        self._checked = 0

    def next_version(self, policy: Policy) -> int:
        """The number of the policy's weights, raised if they have changed. A collective."""
        tensors = trained_tensors(policy)
        found = fingerprint(tensors)
        if any(gather_objects(found != self._fingerprint)):
            self.version += 1
            self._fingerprint = found
            self._previous = self._current if self.version > 1 else None
            self._current = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        return self.version

    @torch.no_grad()
    def check(
        self,
        policy: Policy,
        batch: PromptBatch,
        rollout: Rollout | None,
        sampling: SamplingConfig,
        cached_block: int | None,
        *,
        updated: bool = False,
    ) -> None:
        """Check a version's first rollout that every rank has a part of. A collective.

        Args:
            policy: with the weights of :meth:`next_version`, in eval mode and in the precision of the run.
            batch: the prompts.
            rollout: what the engine sampled. None on a rank without prompts.
            sampling: how. Filters change the engine's log-probabilities, so such rollouts are not checked.
            cached_block: prompts are cached in blocks of this many tokens. None for no cache.
            updated: the policy has been updated since, and lends the weights that it had.

        Raises:
            DeliveryError: on all ranks, if one of them has a rollout from other weights.
        """
        if self._checked == self.version or sampling.filters or sampling.greedy:
            return
        if not all(gather_objects(rollout is not None)) or rollout is None:
            return
        self._checked = self.version
        rows = _some_rows(batch, rollout)
        if updated:
            now = {name: tensor.to("cpu", copy=True) for name, tensor in trained_tensors(policy).items()}
            with other_weights(policy, self._current, own=now):
                self._compare(policy, rows, sampling, cached_block)
        else:
            self._compare(policy, rows, sampling, cached_block)

    def _compare(
        self, policy: Policy, rows: Sequence["_Row"], sampling: SamplingConfig, cached_block: int | None
    ) -> None:
        own = len(rows)
        rows = [*rows, *[rows[0]] * (max(gather_objects(own)) - own)]  # with shards, every pass is a collective
        ways = {
            name: self._logprobs(policy, rows, own, sampling.logprob_temperature, name, cached_block)
            for name in ("current", *_FAILURES)
        }
        rows, current = rows[:own], ways.pop("current")
        sampled = torch.cat([row.sampled for row in rows])
        assert current is not None  # noqa: S101 - it needs nothing that may be missing
        error = sampled.double() - current.double()
        known = error.isfinite()
        error = error[known]
        self.drift = error.abs().mean().item() if len(error) else math.inf if current.isfinite().any() else 0.0
        for name, logprobs in ways.items():
            if logprobs is not None:
                difference = logprobs.double()[known] - current.double()[known]
                usable = difference.isfinite()
                self.evidence[name].add(error[usable], difference[usable])
        for reason in gather_objects(self._verdict(causal_lm(policy))):
            if reason is not None:
                raise DeliveryError(reason)

    def _verdict(self, model: PreTrainedModel) -> str | None:
        limit = _largest_drift(model)
        too_far = self.drift > limit
        failed = {
            name: each for name, each in self.evidence.items() if each.convicts or (too_far and each.remainder < 0.25)
        }
        if failed:
            # Two ways may be alike, such as the base and the weights before the first update.
            least = min(each.remainder for each in failed.values())
            ways = [_FAILURES[name] for name, each in failed.items() if each.remainder <= least + 0.01]
            best = min(failed.values(), key=lambda each: each.remainder)
            return (
                f"The engine sampled from {' or '.join(ways)}, and not from version {self.version} of the policy's "
                f"weights: its log-probabilities show {best.share:.0%} of that difference ({best.deviations:.1f} "
                f"standard errors), and differ from the policy's by {self.drift:.2g} nats per token. The weights were "
                "not delivered. The run ends, because it would learn from another policy's completions. Resume from "
                "its last checkpoint."
            )
        if too_far:
            return (
                f"The engine's log-probabilities differ from the policy's by {self.drift:.2g} nats per token on "
                f"average, and rounding explains at most {limit}. It computes another model. Check that `policy.model` "
                "and the engine's base are the same, with the same type and quantization. Restart servers that another "
                "run has given all of its weights."
            )
        return None

    def _logprobs(
        self, policy: Policy, rows: Sequence["_Row"], own: int, temperature: float, kind: str, block: int | None
    ) -> Tensor | None:
        """Log-probabilities ``(M,)`` of the first ``own`` rows in one of the ways. None if there is none yet."""
        previous = self._previous
        if (kind == "base" and not isinstance(policy, PeftModel)) or (kind in ("previous", "prompts") and not previous):
            return None
        uncached = block is None or all(len(row.prompt) <= block for row in rows)
        if kind == "prompts" and all(gather_objects(uncached)):
            return None
        model = wrapper(causal_lm(policy))
        before: AbstractContextManager[Any] = nullcontext()
        if kind in ("previous", "prompts") and previous is not None:
            before = other_weights(policy, previous, own=self._current)
        elif kind == "base" and isinstance(policy, PeftModel):
            before = policy.disable_adapter()
        caches: list[Any] = [None] * len(rows)
        kept = [0] * len(rows)
        with before:
            if kind != "prompts":
                return torch.cat([_completion(model, row, temperature) for row in rows][:own])
            for index, row in enumerate(rows):
                kept[index] = (len(row.prompt) - 1) // (block or 1) * (block or 1)
                cache = model(row.prompt[None, : kept[index] or 1], use_cache=True).past_key_values
                caches[index] = cache if kept[index] else None
        parts = zip(rows, caches, kept, strict=True)
        return torch.cat([_completion(model, row, temperature, cache, n) for row, cache, n in parts][:own])


@dataclass(frozen=True)
class _Row:
    """A prompt ``(p,)``, the start of its completion ``(c,)`` and the engine's log-probabilities ``(c,)``."""

    prompt: Tensor
    completion: Tensor
    sampled: Tensor


def _some_rows(batch: PromptBatch, rollout: Rollout) -> list[_Row]:
    """Some rows with their first tokens: of all prompts in turn, until there are enough."""
    count, group = len(batch.prompts), len(rollout.texts) // len(batch.prompts)
    rows: list[_Row] = []
    for index in range(min(_ROWS, count * group)):
        place, sample = index % count, index // count
        row = place * group + sample
        mask = rollout.completion_mask[row]
        rows.append(
            _Row(
                batch.input_ids[place][batch.attention_mask[place].bool()],
                rollout.completion_ids[row][mask][:_TOKENS_OF_A_ROW],
                rollout.sampling_logprobs[row][mask][:_TOKENS_OF_A_ROW],
            )
        )
        if sum(len(each.completion) for each in rows) >= _TOKENS:
            break
    return rows


def _completion(model: Any, row: _Row, temperature: float, cache: Any = None, kept: int = 0) -> Tensor:
    """Log-probabilities of a completion after its prompt, of which ``kept`` tokens are in ``cache``."""
    ids = torch.cat([row.prompt[kept:], row.completion[:-1]])[None]
    options = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
    logits = model(ids, logits_to_keep=len(row.completion), **options).logits[0]
    return logprobs_from_logits(logits, row.completion, temperature=temperature)


def _largest_drift(model: PreTrainedModel) -> float:
    """The largest mean difference that rounding explains, in nats per token. 8-bit layers round activations, too."""
    kinds = {model.dtype}
    if any(parameter.dtype == torch.int8 for parameter in model.parameters()):
        kinds.add(torch.bfloat16)
    if torch.is_autocast_enabled(model.device.type):
        kinds.add(torch.get_autocast_dtype(model.device.type))
    return 0.02 if max(torch.finfo(kind).eps for kind in kinds) < 1e-4 else 0.3
