"""The metrics against enumeration, hand computation and the loop twins."""

import itertools
import math
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from lightning_lambdapo.evaluation.metrics import GroupDiagnostics, MajorityAtK, PassAtK, SemanticDensity
from lightning_lambdapo.functional import lambda_advantages

# -- semantic density -----------------------------------------------------------------------------------------------

TEXTS = ["4 apples and 1,200 pears #### 7", "\\boxed{3}", "Two apples and pears", "anything"]
SOLUTIONS = ["4 Apples, 1200 pears\n#### 9", "one step \\boxed{3}", "apples and two pears", None]


@pytest.mark.parametrize(("kind", "n"), [("rouge_l", 1), ("token", 1), ("token", 2)])
def test_density_is_the_mean_over_rows_with_a_reference(kind: Any, n: int) -> None:
    traces = [["4", "apples", "and", "1200", "pears"], [], ["two", "apples", "and", "pears"]]
    solutions = [["4", "apples", ",", "1200", "pears"], ["one", "step"], ["apples", "and", "two", "pears"]]
    rows = [
        reference.semantic_density(trace, solution, kind=kind, n=n, beta=2.0)
        for trace, solution in zip(traces, solutions, strict=True)
    ]
    expected = {name: sum(row[i] for row in rows) / 3 for i, name in enumerate(("precision", "recall", "f"))}
    metric = SemanticDensity(kind=kind, n=n, beta=2.0)
    metric.update(TEXTS[:1], SOLUTIONS[:1])
    metric.update(TEXTS[1:], SOLUTIONS[1:])
    found = metric.compute()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_density_uses_the_tokenizer_for_both_texts() -> None:
    metric = SemanticDensity(tokenizer=lambda text: list(text.strip()))
    metric.update(["abcd #### x"], ["acd #### y"])
    assert [value.item() for value in metric.compute().values()] == pytest.approx([3 / 4, 1.0, 6 / 7])


def test_an_empty_reference_is_a_row_and_no_reference_is_none() -> None:
    metric = SemanticDensity()
    metric.update(["a", "a", "a"], ["a", "", None])
    assert [value.item() for value in metric.compute().values()] == [0.5, 0.5, 0.5]


def test_density_without_references_is_left_out() -> None:
    metric = SemanticDensity()
    metric.update(["a", "b"], [None, None])
    assert metric.compute() == {}
    metric.update([], [])
    assert metric.compute() == {}


def test_density_as_a_call_and_after_a_reset() -> None:
    metric = SemanticDensity()
    assert metric(["a"], ["a"])["f"] == 1.0
    assert metric(["a"], ["b"])["f"] == 0.0
    assert metric.compute()["f"] == 0.5
    metric.reset()
    metric.update(["a"], ["a"])
    assert metric.compute()["f"] == 1.0


@pytest.mark.parametrize("options", [{"kind": "bleu"}, {"n": 2}, {"beta": 0.0}])
def test_density_refuses_bad_settings_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SemanticDensity(**options)


def test_density_refuses_unlike_lengths() -> None:
    with pytest.raises(ValueError, match="2 generated texts have 1 references"):
        SemanticDensity().update(["a", "b"], ["a"])


# -- pass@k and maj@k -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_equals_enumeration(n: int) -> None:
    for k in range(1, n + 1):
        rows = list(itertools.product([False, True], repeat=n))
        metric = PassAtK(k)
        metric.update(torch.tensor(rows[:3]))
        metric.update(torch.tensor(rows[3:]).reshape(-1, n))
        expected = sum(reference.pass_at_k(row, k) for row in rows) / len(rows)
        assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
        for row in rows[:: max(len(rows) // 16, 1)]:
            single = PassAtK(k)
            single.update(torch.tensor([row]))
            assert single.compute().item() == pytest.approx(reference.pass_at_k(row, k), abs=1e-6)


def test_pass_at_k_does_not_overflow() -> None:
    correct = torch.zeros(1, 4000, dtype=torch.bool)
    correct[0, 0] = True
    metric = PassAtK(2000)
    metric.update(correct)
    assert metric.compute().item() == pytest.approx(0.5)


VOTES: list[list[str | None]] = [
    ["7", "9", "9", "7"],  # a tie: the earliest
    ["7", "9", "9", None],
    [None, "9", "7", "7"],
    [None, None, None, "3"],
    ["1", "2", "3", "3"],
    ["x", "x", "y", "y"],
]
CORRECT = [
    [True, False, False, True],
    [True, False, False, False],
    [True, False, True, True],
    [True, True, True, True],
    [False, True, False, False],
    [False, True, True, True],  # the verifier took one spelling of the winning answer and not the other
]


@pytest.mark.parametrize(("k", "expected"), [(1, [1, 1, 0, 0, 0, 0]), (3, [0, 0, 0, 0, 0, 1]), (4, [1, 0, 1, 1, 0, 1])])
def test_majority_by_hand(k: int, expected: list[int]) -> None:
    metric = MajorityAtK(k)
    for votes, correct, right in zip(VOTES, CORRECT, expected, strict=True):
        single = MajorityAtK(k)
        single.update([votes], torch.tensor([correct]))
        assert single.compute().item() == right == reference.majority_at_k(votes, correct, k)
        metric.update([votes], torch.tensor([correct]))
    assert metric.compute().item() == pytest.approx(sum(expected) / 6)


def test_majority_equals_the_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = [None, "1", "2", "3"]
    votes = [[answers[i] for i in row] for row in torch.randint(4, (200, 5), generator=generator).tolist()]
    correct = torch.rand(200, 5, generator=generator) < 0.4
    for k in (1, 2, 4, 5):
        metric = MajorityAtK(k)
        metric.update(votes[:70], correct[:70])
        metric.update(votes[70:], correct[70:])
        rows = [reference.majority_at_k(row, right, k) for row, right in zip(votes, correct.tolist(), strict=True)]
        assert metric.compute().item() == pytest.approx(sum(rows) / 200)


@pytest.mark.parametrize("metric", [PassAtK, MajorityAtK])
def test_k_must_be_possible(metric: Any) -> None:
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        metric(0)
    votes = [] if metric is PassAtK else [[["1", "2"]]]
    with pytest.raises(ValueError, match=r"at least k = 3 samples, got \(1, 2\)"):
        metric(3).update(*votes, torch.ones(1, 2, dtype=torch.bool))


def test_votes_must_match() -> None:
    for votes in ([["1", "2"]], [["1", "2"], ["1"]]):
        with pytest.raises(ValueError, match="`votes` must hold 2 rows of 2 answers"):
            MajorityAtK(1).update(votes, torch.ones(2, 2, dtype=torch.bool))


# -- group diagnostics ----------------------------------------------------------------------------------------------


def rollout(groups: int, *, seed: int = 0, size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (groups, size), generator=generator).double()
    scores = torch.randint(-20, 0, (groups, size), generator=generator).double() / 10  # with ties
    valid = torch.rand(groups, size, generator=generator) < 0.8
    rewards[0] = 1.0
    valid[1] = torch.arange(size) == 2
    valid[2] = False
    lengths = torch.randint(1, 50, (groups, size), generator=generator)
    return {
        "rewards": rewards,
        "scores": scores,
        "advantages": lambda_advantages(rewards, scores, temperature=0.5, valid=valid),
        "lengths": lengths,
        "valid": valid,
    }


def diagnostics_twin(data: dict[str, Tensor], weighting: str | None) -> dict[str, float]:
    rewards, scores, advantages, lengths, valid = (tensor.tolist() for tensor in data.values())
    kept = [[i for i, counts in enumerate(row) if counts] for row in valid]
    rows = [(b, i) for b, places in enumerate(kept) for i in places]
    values = {
        "group_auc": reference.group_auc(rewards, scores, valid),
        "group_sum": sum(advantages[b][i] for b, i in rows if len(kept[b]) > 1) / sum(len(x) > 1 for x in kept),
        "equal_reward_share": sum(
            len({rewards[b][i] for i in places}) == 1 for b, places in enumerate(kept) if places
        ) / sum(bool(places) for places in kept),
        "advantage_length_correlation": reference.pearson(
            [advantages[b][i] for b, i in rows], [lengths[b][i] for b, i in rows]
        ),
    }  # fmt: skip
    if weighting is not None:
        weights = []
        for b, places in enumerate(kept):
            table = reference.group_weights(rewards[b], scores[b], valid[b], weighting=weighting, temperature=0.5)
            weights += [table[i][j] for i, j in itertools.permutations(places, 2)]
        values["weight_extreme_share"] = sum(not 0.05 <= weight <= 0.95 for weight in weights) / len(weights)
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            values[f"weight_q{round(100 * q):02d}"] = reference.quantile(weights, q)
    return values


@pytest.mark.parametrize("weighting", ["uniform", "confidence", "agreement", "lambdarank", None])
def test_diagnostics_equal_the_loops(weighting: Any) -> None:
    data = rollout(12)
    metric = GroupDiagnostics(weighting, temperature=0.5)
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        metric.update(**{name: tensor[part] for name, tensor in data.items()})
    found = {name: value.item() for name, value in metric.compute().items()}
    expected = diagnostics_twin(data, weighting)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # A quantile is the middle of its bin of 0.001.
        assert found[name] == pytest.approx(value, abs=0.000501 if name.startswith("weight_q") else 1e-6), name
    assert 0.1 < expected["group_auc"] < 0.9
    assert abs(expected["advantage_length_correlation"]) > 0.01
    assert abs(expected["group_sum"]) > 0.01


def test_diagnostics_by_hand() -> None:
    metric = GroupDiagnostics("confidence", temperature=1.0)
    metric.update(
        rewards=torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 5.0]]),
        scores=torch.tensor([[0.0, -math.log(99.0), 0.0], [-1.0, -1.0, 0.0]]),
        advantages=torch.tensor([[2.0, -1.0, -0.5], [0.0, 0.0, 7.0]]),
        lengths=torch.tensor([[1, 4, 3], [2, 2, 90]]),
        valid=torch.tensor([[True, True, True], [True, True, False]]),
    )
    found = {name: round(value.item(), 4) for name, value in metric.compute().items()}
    # Weights 0.99, 0.5, 0.01, 0.01, 0.5, 0.99 and 0.5, 0.5; pairs: one right, one tie; sums 0.5 and 0.
    assert found["weight_extreme_share"] == 0.5
    assert found["weight_q05"] == pytest.approx(0.01, abs=6e-4)
    assert found["weight_q50"] == pytest.approx(0.5, abs=6e-4)
    assert found["weight_q95"] == pytest.approx(0.99, abs=6e-4)
    assert found["group_auc"] == 0.75
    assert found["group_sum"] == 0.25
    assert found["equal_reward_share"] == 0.5
    assert found["advantage_length_correlation"] == pytest.approx(
        reference.pearson([2, -1, -0.5, 0, 0], [1, 4, 3, 2, 2]), abs=1e-4
    )


def test_junk_in_invalid_places_has_no_effect() -> None:
    data = rollout(12)
    dirty = {
        name: tensor if name in ("valid", "lengths") else tensor.masked_fill(~data["valid"], math.nan)
        for name, tensor in data.items()
    }
    clean_metric, dirty_metric = (GroupDiagnostics("agreement", temperature=0.5) for _ in range(2))
    clean_metric.update(**data)
    dirty_metric.update(**dirty)
    assert dirty_metric.compute() == clean_metric.compute()


def test_statistics_without_data_are_left_out() -> None:
    ones = torch.ones(2, 3)
    metric = GroupDiagnostics("confidence")
    metric.update(ones, ones, ones, ones, torch.zeros(2, 3, dtype=torch.bool))
    assert metric.compute() == {}
    metric.update(ones, ones, torch.zeros(2, 3), torch.tensor([[1, 2, 3]] * 2), ones.bool())
    # Equal rewards: no ordered pair, and advantages without spread correlate with nothing.
    assert {name for name in metric.compute() if not name.startswith("weight_")} == {"group_sum", "equal_reward_share"}


def test_a_constant_does_not_correlate_through_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    for groups, constant in itertools.product(range(1, 30), (0.1, 0.3, -0.7)):
        metric = GroupDiagnostics(None)
        rewards = torch.rand(groups, 3, generator=generator)
        lengths = torch.randint(1, 999, (groups, 3), generator=generator)
        metric.update(rewards, rewards, torch.full((groups, 3), constant, dtype=torch.float64), lengths, rewards >= 0)
        assert "advantage_length_correlation" not in metric.compute()


def test_bad_settings_are_refused_when_the_metric_is_made() -> None:
    with pytest.raises(ValueError, match="`weighting` must be one of"):
        GroupDiagnostics("softmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`temperature` must be"):
        GroupDiagnostics("confidence", temperature=0.0)
    with pytest.raises(ValueError, match="Shapes must agree"):
        GroupDiagnostics(None).update(**rollout(4) | {"valid": torch.ones(4, 2, dtype=torch.bool)})


@pytest.mark.parametrize(
    "metric", [SemanticDensity(), PassAtK(1), MajorityAtK(1), GroupDiagnostics("confidence"), GroupDiagnostics(None)]
)
def test_every_state_is_a_sum(metric: Any) -> None:
    assert metric.full_state_update is False
    assert {reduction.__name__ for reduction in metric._reductions.values()} == {"dim_zero_sum"}
    assert metric.higher_is_better is (None if isinstance(metric, GroupDiagnostics) else True)
