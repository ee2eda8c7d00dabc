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
from lightning_lambdapo.rollout.completion_text import CompletionText


class RolloutEngine(ABC):
    """Generates a group of completions for each prompt.

    Args:
        tokenizer: decodes the completions.
        eos_ids: every token id that ends a completion.
        pad_id: id written after the end. May be one of ``eos_ids``.

    Attributes:
        text: decodes the completions, and knows the texts that end one. A run sets its own, and adds its stop tokens to
            ``eos_ids``, see :func:`prepare_engine`.
        exact_logprobs: True if the engine computes log-probabilities by the policy's own layers, so that in float32
            they are those of the learning pass to rounding. Otherwise ``importance_correction: auto`` is on.
        has_own_weights: True if the engine decodes with a copy of the policy's weights, which :meth:`sync` delivers.
            Each version's first rollout is then checked for whether it comes from the current weights.
        max_staleness: 1 lets such an engine sample the next rollout while the policy learns from this one, from the
            weights before that update. 0 does not.
        version: number of the weights that such an engine has. :meth:`sync` sets it, and is called if it is another
            than the policy's.
    """

    exact_logprobs: ClassVar[bool] = False
    has_own_weights: ClassVar[bool] = False
    max_staleness: int = 0

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], pad_id: int) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.version = -1
        self.text = CompletionText(tokenizer)

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

    def check(self, policy: Policy) -> None:  # noqa: B027 - most engines decode any policy
        """Refuse a policy that the engine cannot decode. Called once, before anything is sampled.

        Raises:
            ValueError: saying what to change.
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
        """Mask, decode and trim raw ``(N, T)`` completions.

        Tokens after the end-of-sequence token, and after the one that completes a stop string, are ignored. Both belong
        to the completion, with their log-probabilities.
        """
        mask = completion_mask(completion_ids, self.eos_ids)
        ended = ((completion_ids.unsqueeze(-1) == completion_ids.new_tensor(self.eos_ids)).any(-1) & mask).any(-1)
        rows = [ids[keep].tolist() for ids, keep in zip(completion_ids.cpu(), mask.cpu(), strict=True)]
        if self.text.stop_strings:
            lengths = [self.text.length(ids) for ids in rows]
            rows = [ids[:length] for ids, length in zip(rows, lengths, strict=True)]
            ended = ended | torch.tensor([length is not None for length in lengths], device=ended.device)
            kept = torch.tensor([len(ids) for ids in rows], device=mask.device)
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) < kept.unsqueeze(-1))
        width = int(mask.sum(-1).max())
        texts = [self.text.decode(ids) for ids in rows]
        zero = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
        return Rollout(
            completion_ids=completion_ids.masked_fill(~mask, self.pad_id)[:, :width],
            completion_mask=mask[:, :width],
            sampling_logprobs=torch.where(mask, logprobs, zero)[:, :width],
            entropy=None if entropy is None else torch.where(mask, entropy, zero)[:, :width],
            truncated=~ended,
            texts=texts,
        )
