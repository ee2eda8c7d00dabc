"""Tokens weighed by how few of the training references have them: numbers worked by hand, and a run's table."""

import itertools
import math
from pathlib import Path
from typing import Any, cast

import fitting
import pytest
import torch
from comparing import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from small import ROWS, Digits, Rows, module, trainer
from torch.utils.data import DataLoader

from lightning_lambdapo import LambdaPODataModule, LambdaPOModule
from lightning_lambdapo.data import DataSource, PromptCollator
from lightning_lambdapo.evaluation.evaluator import Evaluation
from lightning_lambdapo.evaluation.metrics import SemanticDensity
from lightning_lambdapo.functional import TokenWeights, embedding_density, semantic_density, tokenize
from lightning_lambdapo.functional.token_weights import heaviest_common_subsequence
from lightning_lambdapo.rewards import RewardInputs, SemanticDensityReward

SUMS = ["12+13=25,25+14=39;39", "11+15=26,26+16=42;42", "17+18=35,35+12=47;47"]
ALL, TWO, ONE, NONE = 0.0, math.log(4 / 3), math.log(4 / 2), math.log(4 / 1)  # that many of the three sums have it


def judge(reward: SemanticDensityReward, completions: list[str], references: list[str]) -> list[float | None]:
    count = len(completions)
    return reward(
        RewardInputs(
            ["?"] * count, completions, [None] * count, [*references], [1] * count, [False] * count, [{}] * count
        )
    )


def idf(**settings: Any) -> SemanticDensityReward:
    return SemanticDensityReward(token_weights="idf", **settings)


def f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall)


# -- the formulas ---------------------------------------------------------------------------------------------------


def test_inverse_document_frequencies_by_hand() -> None:
    weights = TokenWeights.idf(map(tokenize, SUMS))
    assert weights.of(["+", "=", ",", ";"]) == [ALL] * 4
    assert weights.of(["12", "13", "25", "99"]) == pytest.approx([TWO, ONE, ONE, NONE])
    assert weights == TokenWeights.idf(map(tokenize, reversed(SUMS)))


def test_wrong_sums_have_different_densities() -> None:
    """Unweighted, a completion that has nothing right but the operators gets 6 of 13 tokens."""
    weights = TokenWeights.idf(map(tokenize, SUMS))
    nothing, copied = "20+21=41,41+22=63;63", "12+13=24,24+14=38;38"
    assert semantic_density(tokenize(nothing), tokenize(SUMS[0])).f == pytest.approx(0.4615, abs=1e-4)
    assert semantic_density(tokenize(nothing), tokenize(SUMS[0]), weights=weights).f == 0.0
    # 12, 13 and 14 are right. The reference has 12 once and six tokens of its own, the trace 24 and 38 twice.
    right = TWO + 2 * ONE
    precision, recall = right / (TWO + 2 * ONE + 4 * NONE), right / (TWO + 6 * ONE)
    found = semantic_density(tokenize(copied), tokenize(SUMS[0]), weights=weights)
    assert tuple(found) == pytest.approx((precision, recall, f(precision, recall)))
    assert tuple(found) == pytest.approx((0.23188, 0.37646, 0.28699), abs=1e-5)
    assert tuple(semantic_density(tokenize(SUMS[0]), tokenize(SUMS[0]), weights=weights)) == pytest.approx((1, 1, 1))


def test_the_heaviest_common_subsequence_is_not_the_longest() -> None:
    weights = TokenWeights({"a": 1.0, "b": 1.0, "c": 5.0}, unseen=0.5)
    # a b is common too, and weighs 2. d is not in the table.
    found = semantic_density(["a", "b", "c", "d"], ["c", "a", "b", "d"], weights=weights)
    assert tuple(found) == pytest.approx((5.5 / 7.5, 5.5 / 7.5, 5.5 / 7.5))


def test_clipped_counts_by_hand() -> None:
    weights = TokenWeights({"a": 2.0, "b": 3.0, "+": 0.0}, unseen=1.0)
    # a a + b against a b b: a and b once each, 2 + 3, of 2 + 2 + 0 + 3 and of 2 + 3 + 3.
    found = semantic_density(["a", "a", "+", "b"], ["a", "b", "b"], kind="token", weights=weights)
    assert tuple(found) == pytest.approx((5 / 7, 5 / 8, f(5 / 7, 5 / 8)))
    # Bigrams a+ +b against a+ +c: 2 in common, of 2 + 3 and of 2 + 1.
    found = semantic_density(["a", "+", "b"], ["a", "+", "c"], kind="token", n=2, weights=weights)
    assert tuple(found) == pytest.approx((2 / 5, 2 / 3, f(2 / 5, 2 / 3)))


def test_embeddings_by_hand() -> None:
    # Cosines of (3, 4) and (-1, 0) with (1, 0), (0, 2), (-2, 0): .6 .8 -.6 and -1 0 1.
    generated = torch.tensor([[[3.0, 4.0], [-1.0, 0.0]]])
    solution = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-2.0, 0.0]]])
    masks = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    found = embedding_density(
        generated, masks[0], solution, masks[1], generated_weights=torch.tensor([[3.0, 1.0]]),
        reference_weights=torch.tensor([[2.0, 0.0, 2.0]]),
    )  # fmt: skip
    precision, recall = (3 * 0.8 + 1) / 4, (2 * 0.6 + 2 * 1) / 4
    assert [value.item() for value in found] == pytest.approx([precision, recall, f(precision, recall)])
    weightless = embedding_density(generated, masks[0], solution, masks[1], reference_weights=torch.zeros(1, 3))
    assert [value.item() for value in weightless] == pytest.approx([0.9, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"`generated_weights` must have the shape of `generated_mask`, \(1, 2\)"):
        embedding_density(generated, masks[0], solution, masks[1], generated_weights=torch.ones(1, 3))


TOKENS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=7)


@settings(max_examples=100, deadline=None)
@given(TOKENS, TOKENS, st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4))
def test_the_heaviest_common_subsequence_equals_the_best_of_all(
    ours: list[str], theirs: list[str], values: list[float]
) -> None:
    weights = TokenWeights(dict(zip("abc", values, strict=False)), unseen=values[3])

    def subsequences(tokens: list[str]) -> set[tuple[str, ...]]:
        return {each for size in range(len(tokens) + 1) for each in itertools.combinations(tokens, size)}

    best = max(sum(weights.of(each)) for each in subsequences(ours) & subsequences(theirs))
    assert heaviest_common_subsequence(ours, theirs, weights) == best


@settings(max_examples=100, deadline=None)
@given(TOKENS, TOKENS, st.sampled_from([("rouge_l", 1), ("token", 1), ("token", 2)]))
def test_weights_of_1_change_nothing(ours: list[str], theirs: list[str], kind: tuple[Any, int]) -> None:
    plain = semantic_density(ours, theirs, kind=kind[0], n=kind[1])
    assert tuple(semantic_density(ours, theirs, kind=kind[0], n=kind[1], weights=TokenWeights({}, 1.0))) == (
        pytest.approx(tuple(plain))
    )


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="finite number, at least 0, and 'a' has"):
        TokenWeights({"a": weight}, 1.0)
    with pytest.raises(ValueError, match="finite number"):
        TokenWeights({}, weight)


@pytest.mark.parametrize("documents", [[], [["a"]], [["a", "b"], ["b", "a"]]])
def test_references_that_do_not_differ_are_refused(documents: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=f"references that differ, got {len(documents)} with"):
        TokenWeights.idf(documents)


# -- reward and metric ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rouge_l", "token"])
def test_the_reward_weighs_the_traces_of_its_references(kind: Any) -> None:
    reward = idf(kind=kind, measure="recall")
    reward.prepare_references([f"{text} #### 39" for text in SUMS])  # no answer is in a trace
    found = judge(reward, ["12 13 #### 39", "+=,+=;"], SUMS[:1] * 2)
    assert found == pytest.approx([(TWO + ONE) / (TWO + 6 * ONE), 0.0])


def test_the_reward_weighs_embeddings_by_the_ids_of_its_encoder(base: str) -> None:
    """One token per character. With layer 0 a cosine is 1 for the same character, whatever the others are."""
    reward = idf(kind="embedding", encoder=base, layer=0, measure="recall")
    reward.prepare_references(["a+b", "a+c", "a-d", "x+b"])
    assert reward.weights is not None
    assert sorted(set(reward.weights.weights.values())) == pytest.approx(
        sorted({math.log(5 / 4), math.log(5 / 3), math.log(5 / 2)})
    )
    [same, other] = cast(list[float], judge(reward, ["a+b", "b"], ["a+b", "a+b"]))
    assert same == pytest.approx(1.0)
    plain = SemanticDensityReward(kind="embedding", encoder=base, layer=0, measure="recall")
    [cosines] = cast(list[float], judge(plain, ["b"], ["a+b"]))
    (a,), (plus,) = (cast(list[float], judge(plain, ["b"], [text])) for text in "a+")
    assert cosines == pytest.approx((a + plus + 1) / 3)
    heavy, light, middle = math.log(5 / 3), math.log(5 / 4), math.log(5 / 4)  # b, a, +
    assert other == pytest.approx((light * a + middle * plus + heavy) / (light + middle + heavy))


def test_without_references_it_does_not_judge() -> None:
    with pytest.raises(ValueError, match=r"'semantic_density' has token_weights='idf'.*Set `data.train`"):
        judge(idf(), ["a"], ["a"])
    with pytest.raises(ValueError, match="idf or null, got 'tfidf'"):
        SemanticDensityReward(token_weights=cast(Any, "tfidf"))
    reward = SemanticDensityReward(kind="embedding", token_weights="idf")
    reward.prepare_encoder(lambda _: pytest.fail("unused"), torch.device("cpu"))
    with pytest.raises(ValueError, match="an encoder with a method `token_ids`"):
        reward.prepare_references(SUMS)


def test_the_metric_weighs_too() -> None:
    metric = SemanticDensity(token_weights=TokenWeights.idf(map(tokenize, SUMS)))
    metric.update(["12+13=24,24+14=38;38", "20+21=41,41+22=63;63"], SUMS[:1] * 2)
    assert metric.compute()["f"].item() == pytest.approx(0.28699 / 2, abs=1e-5)


# -- in a run -------------------------------------------------------------------------------------------------------


def table(model: LambdaPOModule) -> TokenWeights:
    found = cast(SemanticDensityReward, model.rewards[-1]).weights
    assert found is not None
    return found


EXPECTED = TokenWeights.idf(tokenize(str(row["reference"])) for row in ROWS)


class Other(Rows):
    """The same prompts with other references."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for split, rows in self._rows.items():
            self._rows[split] = [row | {"reference": f"so {row['prompt_id']}"} for row in rows]


def test_a_run_weighs_by_its_training_set_and_a_resumed_one_as_before(base: str, tmp_path: Path) -> None:
    rewards = [Digits(), idf(kind="token")]
    model = module(base, rewards=rewards)
    trainer(tmp_path, limit_train_batches=2, limit_val_batches=1).fit(model, Rows(batch_size=4))
    assert table(model) == EXPECTED
    assert cast(Evaluation, model.evaluator.stages["val"]).density.token_weights == EXPECTED
    saved = tmp_path / "run.ckpt"
    model.trainer.save_checkpoint(saved)

    again = module(base, rewards=[Digits(), idf(kind="token")])
    trainer(tmp_path, max_epochs=2, limit_train_batches=2).fit(again, Other(batch_size=4), ckpt_path=saved)
    assert table(again) == EXPECTED
    tested = module(base, rewards=[Digits(), idf(kind="token")])
    trainer(tmp_path).test(tested, Other(batch_size=4), ckpt_path=saved, verbose=False)
    assert table(tested) == EXPECTED
    assert cast(Evaluation, tested.evaluator.stages["test"]).density.token_weights == EXPECTED
    # Another run has other weights, even of the same reward.
    trainer(tmp_path, limit_train_batches=1).fit(module(base, rewards=rewards), Other(batch_size=4))
    assert cast(SemanticDensityReward, rewards[-1]).weights != EXPECTED


def test_without_a_checkpoint_the_configured_training_data_counts(base: str, tmp_path: Path) -> None:
    def data(**sources: Any) -> LambdaPODataModule:
        return LambdaPODataModule(**sources, batch_size=4)

    train, val = (DataSource(preset="arithmetic", size=6, seed=seed) for seed in (0, 1))
    model = module(base, rewards=[idf()])
    judge = trainer(tmp_path, limit_val_batches=1)
    judge.validate(model, data(train=train, val=val), verbose=False)
    whole = data(train=train)
    whole.tokenizer = model.tokenizer
    whole.setup("fit")
    assert table(model) == TokenWeights.idf(tokenize(row["reference"]) for row in whole.train_rows)
    with pytest.raises(ValueError, match=r"there are none\. Set `data.train`"):
        judge.validate(module(base, rewards=[idf()]), data(val=val), verbose=False)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:The .* does not have many workers")
def test_plain_loaders_need_a_call(base: str, tmp_path: Path) -> None:
    reward = idf()
    model = module(base, rewards=[reward])
    loader = DataLoader(cast(Any, ROWS[:4]), batch_size=4, collate_fn=PromptCollator(model.tokenizer))
    with pytest.raises(ValueError, match="call its `prepare_references` with a list of references"):
        trainer(tmp_path, limit_train_batches=1).fit(model, loader)
    reward.prepare_references(SUMS)
    trainer(tmp_path, limit_train_batches=1).fit(model, loader)
    assert table(model) == TokenWeights.idf(map(tokenize, SUMS))


@pytest.mark.slow
def test_ranks_judge_as_one(base: str, tmp_path: Path) -> None:
    """Each rank trains on half of the prompts, and weighs by all of them."""
    options: dict[str, Any] = {"kind": "lora64", "rewards": [Digits(), idf(kind="token")]}
    one = fitting.train_on_ranks(tmp_path / "one", base, 1, how="one", **options)
    two = fitting.train_on_ranks(tmp_path / "two", base, 2, how="ddp", **options)
    assert any("semantic_density" in name for _, name in fitting.metrics(one))
    assert_same(one, two, tolerance=1e-6)
