"""Sampling within the memory there is: a rollout that runs out of it is repeated with fewer tokens at once."""

import warnings
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.rollout.engine import RolloutEngine
from lightning_lambdapo.rollout.grouped import GroupedEngine


class LiveTokens:
    """Calls engines, and repeats a call with half the tokens when memory runs out.

    A row's tokens depend on its own stream alone, so that they are drawn again whatever is decoded beside them. The
    limit stays for the rest of the run. The grouped engine receives it as its ``max_live_tokens``. Other engines are
    called with fewer prompts at once. No other rank takes part, because a rollout makes no collective.

    Args:
        limit: tokens of prompts and longest possible completions at once. None does not limit them.

    Attributes:
        retries: number of times that a rollout has run out of memory.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.retries = 0

    def generate(
        self,
        engine: RolloutEngine,
        model: PreTrainedModel,
        batch: PromptBatch,
        *,
        sampling: SamplingConfig,
        uniforms: Tensor,
    ) -> Rollout:
        """Generate completions with ``engine``. See :meth:`RolloutEngine.generate`.

        Raises:
            torch.OutOfMemoryError: the completions of a single prompt do not fit.
        """
        group_size = len(uniforms) // len(batch.prompts)
        needs = (batch.attention_mask.sum(-1) + group_size * uniforms.shape[1]).tolist()
        while True:
            try:
                return self._generate(engine, model, batch, needs, sampling, uniforms)
            except torch.OutOfMemoryError as error:
                parts = self._parts(engine, needs)
                if max(map(len, parts)) == 1:
                    raise torch.OutOfMemoryError(
                        f"The {group_size} completions of a single prompt do not fit in memory while they are sampled: "
                        f"with the prompt they have up to {max(needs)} tokens. Lower `max_new_tokens` (now "
                        f"{uniforms.shape[1]}), or `rollout.group_size` in training and `validation.num_samples` "
                        f"elsewhere. {error}"
                    ) from error
            # The traceback keeps the failed attempt's tensors alive, so memory is freed only after the except block.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.limit = max(sum(needs[place] for place in part) for part in parts) // 2
            self.retries += 1
            warnings.warn(
                f"A rollout ran out of memory. From now on at most {self.limit} tokens are decoded together. These "
                "completions are sampled again. Set `rollout.max_live_tokens` to that number.",
                stacklevel=2,
            )

    def _generate(
        self,
        engine: RolloutEngine,
        model: PreTrainedModel,
        batch: PromptBatch,
        needs: list[int],
        sampling: SamplingConfig,
        uniforms: Tensor,
    ) -> Rollout:
        if self.retries and isinstance(engine, GroupedEngine):
            engine.config = replace(engine.config, max_live_tokens=self.limit)
        parts = self._parts(engine, needs)
        if len(parts) == 1 or _admits_by_itself(engine):
            return engine.generate(model, batch, sampling=sampling, uniforms=uniforms)
        streams = uniforms.unflatten(0, (len(batch.prompts), -1))
        rollout = reduce(
            Rollout.join,
            (
                engine.generate(model, batch.select(part), sampling=sampling, uniforms=streams[part].flatten(0, 1))
                for part in parts
            ),
        )
        # Joining pads with token 0, the engine with its own.
        return replace(
            rollout, completion_ids=rollout.completion_ids.masked_fill(~rollout.completion_mask, engine.pad_id)
        )

    def _parts(self, engine: RolloutEngine, needs: list[int]) -> list[list[int]]:
        """Prompts in order, in parts that are decoded together. Each has at least one prompt."""
        limit = self.limit if self.retries or _admits_by_itself(engine) else None
        parts: list[list[int]] = [[]]
        used = 0
        for place, need in enumerate(needs):
            used += need
            if parts[-1] and limit is not None and used > limit:
                parts.append([])
                used = need
            parts[-1].append(place)
        return parts


def _admits_by_itself(engine: RolloutEngine) -> bool:
    """True if the engine reads ``max_live_tokens``: the grouped one, unless it has fallen back to ``generate``."""
    return isinstance(engine, GroupedEngine) and getattr(engine, "_fallback", None) is None
