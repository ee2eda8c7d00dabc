"""The interface of a rollout engine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.functional import completion_mask
from lightning_lambdapo.policy.model import Policy


class RolloutEngine(ABC):
    """Generates a group of completions for each prompt.

    Args:
        tokenizer: decodes the completions.
        eos_ids: every token id that ends a completion.
        pad_id: id written after the end. May be one of ``eos_ids``.

    Attributes:
        exact_logprobs: True if the engine computes log-probabilities by the policy's own layers, so that in float32
            they are those of the learning pass to rounding. Otherwise ``importance_correction: auto`` is on.
        has_own_weights: True if the engine decodes with a copy of the policy's weights, which :meth:`sync` delivers.
            Each version's first rollout is then checked for whether it comes from the current weights.
        version: number of the weights that such an engine has. :meth:`sync` sets it, and is called if it is another
            than the policy's.
    """

    exact_logprobs: ClassVar[bool] = False
    has_own_weights: ClassVar[bool] = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], pad_id: int) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.version = -1

    @abstractmethod
    def generate(
        self, model: PreTrainedModel, batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        """Generate completions. Called without gradient and with the model in eval mode.

        Args:
            model: the causal language model.
            batch: ``B`` left-padded prompts.
            sampling: how tokens are drawn.
            uniforms: ``(N, max_new_tokens)`` float64, each row's stream. ``N`` is a multiple of ``B``.

        Returns:
            The rollout, ``N`` rows in group-major order.
        """

    def sync(self, policy: Policy, version: int) -> None:  # noqa: B027 - most engines have nothing to do
        """Deliver the policy's weights. Called before a rollout on all ranks, where sharded weights are gathered.

        Args:
            policy: the policy with its current weights.
            version: their number, which changes when the weights do.
        """

    @property
    def cached_block(self) -> int | None:
        """Prompts are cached from one rollout to the next in blocks of this many tokens. None for no such cache."""
        return None

    def sleep(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Free memory, because the policy learns now. The next :meth:`sync` or :meth:`generate` wakes the engine."""

    def close(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Free everything. A later :meth:`sync` may start the engine again."""

    def finish(self, completion_ids: Tensor, logprobs: Tensor, entropy: Tensor | None) -> Rollout:
        """Mask, decode and trim raw ``(N, T)`` completions. Tokens after the end-of-sequence token are ignored."""
        mask = completion_mask(completion_ids, self.eos_ids)
        ended = (completion_ids.unsqueeze(-1) == completion_ids.new_tensor(self.eos_ids)).any(-1) & mask
        width = int(mask.sum(-1).max())
        texts = [
            str(self.tokenizer.decode(ids[keep].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids, keep in zip(completion_ids.cpu(), mask.cpu(), strict=True)
        ]
        zero = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
        return Rollout(
            completion_ids=completion_ids.masked_fill(~mask, self.pad_id)[:, :width],
            completion_mask=mask[:, :width],
            sampling_logprobs=torch.where(mask, logprobs, zero)[:, :width],
            entropy=None if entropy is None else torch.where(mask, entropy, zero)[:, :width],
            truncated=~ended.any(-1),
            texts=texts,
        )
