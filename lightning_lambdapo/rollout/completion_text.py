"""From tokens to the text that rewards see, and the text that ends a completion."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

#: A token may be part of a character. Looking at this many more keeps the beginning of a tail from mattering.
_MARGIN = 8
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class CompletionText:
    """Decodes completions.

    Args:
        tokenizer: the policy's.
        kept_ids: special tokens whose text stays. All others are stripped.
        stop_strings: texts that end a completion. They may contain special tokens, kept or not.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kept_ids: Iterable[int] = (), stop_strings: Sequence[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = tuple(stop_strings)
        special = special_tokens(tokenizer)
        self.kept_ids = special.keys() & set(kept_ids)
        self._stripped = special.keys() - self.kept_ids
        self._tail = max((len(each.encode()) for each in self.stop_strings), default=0) + _MARGIN

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion's tokens, as rewards see it."""
        if not self.kept_ids:
            return self._decode(ids, skip_special_tokens=True)
        return self._decode([each for each in ids if each not in self._stripped])

    def stops(self, ids: Sequence[int], new: int) -> bool:
        """Whether the tokens contain a stop string, if all but the last ``new`` of them did not."""
        return self._contains(ids[-(self._tail + new) :]) and self._contains(ids)

    def length(self, ids: Sequence[int]) -> int | None:
        """Number of tokens through the one that completes a stop string first. None without any."""
        if not self._contains(ids):
            return None
        without, found = 0, len(ids)
        while found - without > 1:
            middle = (without + found) // 2
            if self._contains(ids[:middle]):
                found = middle
            else:
                without = middle
        return found

    def _contains(self, ids: Sequence[int]) -> bool:
        if not self.stop_strings or not len(ids):
            return False
        text = self._decode(ids)
        return any(each in text for each in self.stop_strings)

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids and texts of all tokens that decoding without special tokens strips."""
    found = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return found | {index: str(token) for index, token in named}


def tag_pairs(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens that open or close something, such as ``<think>`` and ``</think>``. Not ``<s>`` and ``</s>``."""
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    special = {index: token for index, token in special_tokens(tokenizer).items() if index not in roles}
    opening = {token.replace("/", "", 1) for token in special.values() if "/" in token} & set(special.values())
    return {index: token for index, token in special.items() if token.replace("/", "", 1) in opening}
