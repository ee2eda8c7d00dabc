"""The policy as it was before training, as the reader of texts for rewards that compare embeddings."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.policy import Policy, causal_lm, evaluating, reference_mode
from lightning_lambdapo.rewards import Reward
from lightning_lambdapo.rewards.encoder import TokenEncoder


class ReferenceEncoder(TokenEncoder):
    """Texts -> hidden states of the frozen reference: the policy's own weights with the adapter off, or the copy.

    Args:
        policy: what is trained.
        reference: its frozen copy; None where switching the policy's adapter gives the reference.
        tokenizer: the policy's.
        layer: which hidden state.
        max_tokens: tokens, padding included, that are read at once.
    """

    def __init__(
        self,
        policy: Policy,
        reference: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layer: int,
        max_tokens: int,
    ) -> None:
        self.owner = policy if reference is None else reference
        self.switches = reference is None
        super().__init__(causal_lm(self.owner).get_decoder(), tokenizer, layer=layer, max_tokens=max_tokens)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed the tokens of each text; see :class:`TokenEncoder`."""
        with evaluating(self.owner), reference_mode(self.owner) if self.switches else nullcontext():
            return super().__call__(texts)


def prepare_encoders(
    rewards: Sequence[Reward],
    policy: Policy,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    max_tokens: int,
) -> None:
    """Hand each reward that needs one an encoder made of the frozen reference, and all of them the device.

    Args:
        rewards: the judges.
        policy: what is trained.
        reference: its frozen copy; None where switching the policy's adapter gives the reference.
        tokenizer: the policy's.
        device: where the module computes.
        max_tokens: tokens, padding included, that an encoder reads at once.
    """
    for reward in rewards:
        encoder = (
            ReferenceEncoder(policy, reference, tokenizer, layer=reward.encoder_layer, max_tokens=max_tokens)
            if reward.needs_encoder
            else None
        )
        reward.prepare_encoder(encoder, device)
