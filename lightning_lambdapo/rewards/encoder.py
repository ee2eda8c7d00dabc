"""Contextual token embeddings of texts, from any transformers model."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lightning_lambdapo.rewards.base import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TokenEncoder:
    """Texts -> the hidden states of their tokens in one model.

    The model reads the special tokens that the tokenizer adds, but they do not count. If there are none, the
    beginning-of-sequence token (or else the end-of-sequence token) is put first and does not count either, because
    causal models use the first token as an attention sink. Its hidden state says nothing about the text.

    Args:
        model: encoder, or decoder without its output head. It is used as it is.
        tokenizer: the model's.
        layer: which hidden state: 0 is the input embedding, -1 the last, after the final norm.
        max_tokens: tokens, padding included, that are read at once. It limits memory and changes no embedding.
        reading: returns the context in which the model reads. For a policy, it switches the adapter off.

    Raises:
        ValueError: a layer that the model does not have.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        layer: int = -1,
        max_tokens: int = 16384,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        config = model.config.get_text_config()
        depth = config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"`layer` must be from {-depth - 1} to {depth}, got {layer}: {type(model).__name__} has {depth} layers."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.layer = layer
        self.max_tokens = max_tokens
        self.reading = reading
        self.positions = min(getattr(config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length)

    @classmethod
    def from_pretrained(cls, name: str, *, layer: int, device: torch.device | str) -> Self:
        """Load a frozen model with its tokenizer. Of an encoder-decoder model, only the encoder is used.

        Args:
            name: hub id or directory.
            layer: as above.
            device: where the model goes.

        Raises:
            ValueError: there is no such model.
        """
        from transformers import AutoModel, AutoTokenizer

        with torch.inference_mode(False):  # a model loaded in validation is used in training too
            try:
                model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"`encoder` is {name!r}, and no model could be loaded from there ({error}). Give a hub id, or a "
                    "directory with a transformers model and its tokenizer."
                ) from error
            if model.config.is_encoder_decoder:
                model = model.get_encoder()
            return cls(model.requires_grad_(False).eval().to(device), tokenizer, layer=layer)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed the tokens of each text.

        Args:
            texts: ``N`` texts. Only the beginning of one that is longer than the model's positions is read.

        Returns:
            Embeddings ``(N, S, D)`` in the model's type and, True where a token counts, ``(N, S)`` bool. A row does
            not depend on the other texts, except by rounding.
        """
        ids, read, counts = self._tokens(texts)
        embeddings = torch.zeros(len(texts), 0, 1, device=ids.device)
        for rows in self._batches(read.sum(1).tolist(), counts.any(1).tolist()):
            width = int(read[rows].sum(1).max())
            with self.reading():
                hidden = self._hidden(ids[rows, :width], read[rows, :width].long())
            if not embeddings.numel():
                embeddings = hidden.new_zeros(*ids.shape, hidden.shape[-1])
            embeddings[rows, :width] = hidden
        return embeddings, counts[:, : embeddings.shape[1]]

    def token_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The tokens of each text, without reading it: ids ``(N, S)`` and, True where one counts, ``(N, S)`` bool.

        They lie where :meth:`__call__` has their embeddings.
        """
        ids, _, counts = self._tokens(texts)
        return ids, counts

    def _hidden(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            options["use_cache"] = False
        if self.layer == -1:
            last: Tensor = self.model(input_ids=ids, attention_mask=attention_mask, **options).last_hidden_state
            return last
        output = self.model(input_ids=ids, attention_mask=attention_mask, output_hidden_states=True, **options)
        chosen: Tensor = output.hidden_states[self.layer]
        return chosen

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids padded on the right, where there is a token, and which tokens count: ``(N, S)`` each."""
        texts = [text.encode(errors="replace").decode() for text in texts]  # half a surrogate pair cannot be tokenized
        encoded = self.tokenizer(texts, return_special_tokens_mask=True, verbose=False)
        first: list[int] = []
        if not any(map(any, encoded["special_tokens_mask"])):
            ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            first = [token for token in ids if isinstance(token, int)][:1]
        room = self.positions - len(first)
        longest = max(map(len, encoded["input_ids"]))
        if longest > room:
            warnings.warn(
                f"A text of {longest} tokens does not fit the {self.positions} positions of "
                f"{type(self.model).__name__}. Only its beginning is read.",
                stacklevel=4,
            )
            encoded = self.tokenizer(texts, return_special_tokens_mask=True, truncation=True, max_length=room)
        rows = [torch.tensor(first + row) for row in encoded["input_ids"]]
        added = [torch.tensor([1] * len(first) + row, dtype=torch.long) for row in encoded["special_tokens_mask"]]
        lengths = torch.tensor([len(row) for row in rows])
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).long()
        counts = nn.utils.rnn.pad_sequence(added, batch_first=True, padding_value=1) == 0
        read = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
        device = self.model.device
        return padded.to(device), read.to(device), counts.to(device)

    def _batches(self, lengths: list[int], counts: list[bool]) -> Iterator[list[int]]:
        """Rows of similar length to read together. Rows in which nothing counts are omitted."""
        batch: list[int] = []
        for row in sorted(range(len(lengths)), key=lengths.__getitem__):
            if not counts[row]:
                continue
            if batch and (len(batch) + 1) * lengths[row] > self.max_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def prepare_encoders(
    rewards: Sequence[Reward],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
    *,
    max_tokens: int,
    reading: Callable[[], AbstractContextManager[None]],
) -> None:
    """Give each reward that needs one an encoder of the frozen policy, and all rewards the device.

    Args:
        rewards: the judges.
        model: the policy, or its frozen copy.
        tokenizer: the policy's.
        device: where the module computes.
        max_tokens: see :class:`TokenEncoder`.
        reading: the context in which the model answers as it was before training.
    """
    for reward in rewards:
        encoder = None
        if reward.needs_encoder:
            encoder = TokenEncoder(
                model.get_decoder(), tokenizer, layer=reward.encoder_layer, max_tokens=max_tokens, reading=reading
            )
        reward.prepare_encoder(encoder, device)
