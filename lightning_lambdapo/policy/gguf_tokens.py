"""The tokenizer of a GGUF file, with the special tokens that the file names."""

from pathlib import Path

import transformers
from gguf import GGUFReader
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def gguf_tokenizer(directory: Path, name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a GGUF file.

    Transformers before 5.18 gives a Llama's beginning token as its end, omits its padding, and fails if the file names
    no beginning. The first two are mended here.

    Raises:
        ValueError: this version of transformers cannot read it.
    """
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18):
        return AutoTokenizer.from_pretrained(directory, gguf_file=name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    except AttributeError as error:
        raise ValueError(
            f"transformers {transformers.__version__} cannot read the tokenizer of {directory / name} ({error}). "
            "Install transformers>=5.18, or set `policy.tokenizer` to the model's tokenizer."
        ) from error
    fields = GGUFReader(directory / name).fields
    for kind, name_there in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        field = fields.get(f"tokenizer.ggml.{name_there}_token_id")
        if field is not None:
            token = tokenizer.convert_ids_to_tokens(int(field.parts[field.data[0]][0]))
            setattr(tokenizer, f"{kind}_token", token)
    return tokenizer
