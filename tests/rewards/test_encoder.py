"""Token embeddings of texts: those of the model alone, whatever else is read with them."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5Model

from lightning_lambdapo.rewards.encoder import TokenEncoder

TEXTS = ["a+b=7", "", "so 3 + 4 = 7, and then", "7", "abc 123"]


def decoder(architecture: str) -> PreTrainedModel:
    """float64, so that padding can be told from rounding; ``bert`` reads in both directions."""
    if architecture == "bert":
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        both: PreTrainedModel = BertModel(BertConfig(vocab_size=49, initializer_range=0.3, **sizes)).double().eval()
        return both
    found: PreTrainedModel = tiny.model(architecture, dtype=torch.float64).get_decoder()
    return found


def with_frame() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <pad> in front and <eos> at the end, as BERT's does its own two."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    return tokenizer


def alone(model: PreTrainedModel, ids: list[int], layer: int = -1) -> Tensor:
    """Hidden states of one unpadded row."""
    with torch.no_grad():
        states: Tensor = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
    return states[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "bert"])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_neighbours_and_padding_change_nothing(architecture: str, max_tokens: int) -> None:
    model = decoder(architecture)
    embeddings, mask = TokenEncoder(model, tiny.tokenizer(), max_tokens=max_tokens)(TEXTS)
    assert embeddings.shape[:2] == mask.shape
    for row, text in enumerate(TEXTS):
        ids = tiny.tokenizer()(text)["input_ids"]
        assert mask[row].tolist() == [False] + [True] * len(ids) + [False] * (mask.shape[1] - 1 - len(ids))
        expected = alone(model, [1, *ids])[1:] if ids else embeddings[row, :0]
        torch.testing.assert_close(embeddings[row][mask[row]], expected, rtol=0, atol=1e-9)


def test_special_tokens_are_read_and_do_not_count() -> None:
    model = decoder("llama")
    embeddings, mask = TokenEncoder(model, with_frame())(["a+b", "", "7"])
    assert mask.tolist() == [[False, True, True, True, False], [False] * 5, [False, True, False, False, False]]
    ids = tiny.tokenizer()("a+b")["input_ids"]
    torch.testing.assert_close(embeddings[0, 1:4], alone(model, [0, *ids, 1])[1:4], rtol=0, atol=1e-9)


@pytest.mark.parametrize("layer", [-3, -2, -1, 0, 1, 2])
def test_layers_are_those_of_transformers(layer: int) -> None:
    model = decoder("llama")
    embeddings, mask = TokenEncoder(model, tiny.tokenizer(), layer=layer)(["a+b"])
    ids = tiny.tokenizer()("a+b")["input_ids"]
    torch.testing.assert_close(embeddings[mask], alone(model, [1, *ids], layer)[1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("layer", [-4, 3])
def test_a_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"`layer` must be from -3 to 2, got {layer}: LlamaModel has 2 layers"):
        TokenEncoder(decoder("llama"), tiny.tokenizer(), layer=layer)


def test_the_budget_bounds_what_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    encoder = TokenEncoder(decoder("llama"), tiny.tokenizer(), max_tokens=12)
    hidden = encoder._hidden

    def spy(ids: Tensor, attention_mask: Tensor) -> Tensor:
        shapes.append((ids.shape[0], ids.shape[1]))
        return hidden(ids, attention_mask)

    monkeypatch.setattr(encoder, "_hidden", spy)
    encoder(["abc", "a", "abcde", "ab", "", "abcdefghijklmnop"])  # and a token in front
    assert shapes == [(3, 4), (1, 6), (1, 17)]


def test_nothing_that_counts() -> None:
    embeddings, mask = TokenEncoder(decoder("llama"), tiny.tokenizer())(["", ""])
    assert (embeddings.shape[:2], mask.shape) == ((2, 0), (2, 0))


@pytest.mark.parametrize("framed", [False, True])
def test_longer_than_the_positions(framed: bool) -> None:
    encoder = TokenEncoder(decoder("gpt2"), with_frame() if framed else tiny.tokenizer())
    with pytest.warns(UserWarning, match=r"A text of \d+ tokens does not fit the 128 positions of GPT2Model"):
        _, mask = encoder(["a" * 300, "b"])
    assert mask.sum(1).tolist() == [126 if framed else 127, 1]


def test_half_a_surrogate_pair_is_read_as_something() -> None:
    assert TokenEncoder(decoder("llama"), tiny.tokenizer())(["a\ud800b"])[1].sum() == 3


def test_loading(base: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        encoder = TokenEncoder.from_pretrained(base, layer=-1, device="cpu")
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not any(each.is_inference() for each in (*encoder.model.parameters(), *encoder.model.buffers()))
    ids = tiny.tokenizer()("a+b")["input_ids"]
    embeddings, mask = encoder(["a+b"])
    torch.testing.assert_close(embeddings[mask], alone(tiny.model("llama").get_decoder(), [1, *ids])[1:])
    T5Model(
        T5Config(vocab_size=49, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0)
    ).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    embeddings, mask = TokenEncoder.from_pretrained(str(tmp_path), layer=-1, device="cpu")(["a+b"])
    assert embeddings.shape == (1, 4, 16)
    with pytest.raises(ValueError, match=r"`encoder` is '.*nowhere', and no model could be loaded"):
        TokenEncoder.from_pretrained(str(tmp_path / "nowhere"), layer=-1, device="cpu")
