"""What a rollout engine is given and must give back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.functional import completion_mask
from lightning_lambdapo.rollout.sampling import SamplingConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are generated for training.

    Attributes:
        engine: ``"grouped"`` (prompts stored once, finished rows dropped) or ``"hf"`` (transformers' ``generate``, also
            what ``"grouped"`` falls back to for architectures it cannot decode).
        group_size: rollouts per prompt, G. At least 2.
        max_new_tokens: longest completion, in tokens.
        sampling: how tokens are drawn.
        reserve_prompts: of each training batch hold back this many prompts, which then take the places of groups whose
            rewards are all equal (dynamic sampling). A step trains on the others' number; what is left of the reserve
            waits for the next epoch. 0 switches it off. With several ranks each has a reserve of its own.
        max_live_tokens: tokens for which the grouped engine holds keys and values at once, each row counting with its
            longest possible completion; further prompts come in as rows end. None decodes all prompts together.
        merge_adapter: decode with a merged copy of the LoRA-adapted weights; None does so on the CPU.
        share_prompts: False makes the grouped engine compute and store a prompt for each of its rows.
        compaction: False makes it keep rows that have ended until all others have.
    """

    engine: Literal["grouped", "hf"] = "grouped"
    group_size: int = 8
    max_new_tokens: int = 256
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reserve_prompts: int = 0
    max_live_tokens: int | None = None
    merge_adapter: bool | None = None
    share_prompts: bool = True
    compaction: bool = True

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"`group_size` must be at least 2, got {self.group_size}; a pairwise advantage needs a peer."
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if self.reserve_prompts < 0:
            raise ValueError(f"`reserve_prompts` must be at least 0, got {self.reserve_prompts}.")
        if self.max_live_tokens is not None and self.max_live_tokens < 1:
            raise ValueError(f"`max_live_tokens` must be at least 1, got {self.max_live_tokens}.")
        if self.sampling.greedy:
            raise ValueError(
                "`rollout.sampling.temperature` is 0: greedy decoding makes all rollouts of a group the same, so there "
                "is nothing to compare; set it above 0."
            )


class RolloutEngine(ABC):
    """Generates a group of completions for each prompt.

    Args:
        tokenizer: decodes the completions.
        eos_ids: every token id that ends a completion.
        pad_id: id written after the end; may be one of ``eos_ids``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], pad_id: int) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id

    @abstractmethod
    def generate(
        self, model: PreTrainedModel, batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        """Generate completions; called without gradient and with the model in eval mode.

        Args:
            model: the causal language model.
            batch: ``B`` left-padded prompts.
            sampling: how tokens are drawn.
            uniforms: ``(N, max_new_tokens)`` float64, each row's stream; ``N`` is a multiple of ``B``.

        Returns:
            The rollout, ``N`` rows in group-major order.
        """

    def finish(self, completion_ids: Tensor, logprobs: Tensor, entropy: Tensor) -> Rollout:
        """Mask, decode and trim raw ``(N, T)`` completions whose junk follows their end-of-sequence token."""
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
            entropy=torch.where(mask, entropy, zero)[:, :width],
            truncated=~ended.any(-1),
            texts=texts,
        )
