"""Pairwise advantages and baselines: golden files, the loop twin, and each property of the formulas by itself."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lambdapo.functional import group_advantages, lambda_advantages, pairwise_weights, sequence_scores

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTINGS = ["uniform", "confidence", "agreement", "lambdarank"]
REDUCTIONS = ["sum", "mean", "weighted_mean"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def golden(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((GOLDEN / f"{name}.json").read_text())
    return rows


def groups(batch: int = 5, size: int = 6, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(batch, size, dtype=torch.float64, generator=generator)
    scores = torch.randn(batch, size, dtype=torch.float64, generator=generator)
    return rewards, scores


def close(found: Tensor, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=atol, rtol=0.0)


# -- against numbers made elsewhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lambda_advantages_golden(dtype: torch.dtype) -> None:
    rows = golden("advantages")
    assert len(rows) == 144
    for row in rows:
        expected = row.pop("advantages")
        tensors: dict[str, Any] = {name: torch.tensor(row.pop(name), dtype=dtype) for name in ("rewards", "scores")}
        found = lambda_advantages(**tensors, valid=torch.tensor(row.pop("valid")), **row)
        assert found.dtype == dtype
        close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_group_advantages_golden(dtype: torch.dtype) -> None:
    rows = golden("group_advantages")
    assert {row["estimator"] for row in rows} == {"grpo", "dr_grpo", "rloo"}
    for row in rows:
        rewards, valid = torch.tensor(row["rewards"], dtype=dtype), torch.tensor(row["valid"])
        close(group_advantages(rewards, estimator=row["estimator"], valid=valid), row["advantages"], TOLERANCE[dtype])


@st.composite
def ragged_groups(draw: st.DrawFn) -> dict[str, Any]:
    batch, size = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    # Tenths, so that ties of rewards and of scores come up.
    tenths = st.integers(-30, 30).map(lambda number: number / 10)

    def table(elements: st.SearchStrategy[Any]) -> Any:
        return draw(st.lists(st.lists(elements, min_size=size, max_size=size), min_size=batch, max_size=batch))

    return {
        "rewards": table(st.sampled_from([0.0, 1.0]) if draw(st.booleans()) else tenths),
        "scores": table(tenths),
        "valid": table(st.sampled_from([True, True, True, False])),
    }


@settings(max_examples=200, deadline=None)
@given(
    ragged_groups(),
    st.sampled_from(WEIGHTINGS),
    st.sampled_from([0.05, 1.0, 7.0, "group_std"]),
    st.sampled_from(REDUCTIONS),
    st.booleans(),
    st.sampled_from(["none", "group", "batch"]),
)
def test_lambda_advantages_equal_the_loops(
    data: dict[str, Any], weighting: Any, temperature: Any, reduction: Any, center: bool, scale: Any
) -> None:
    tensors: dict[str, Any] = {
        "rewards": torch.tensor(data["rewards"], dtype=torch.float64),
        "scores": torch.tensor(data["scores"], dtype=torch.float64),
        "valid": torch.tensor(data["valid"]),
    }
    options: dict[str, Any] = {"weighting": weighting, "temperature": temperature}
    found = lambda_advantages(**tensors, **options, reduction=reduction, center=center, scale=scale)
    close(found, reference.lambda_advantages(**data, **options, reduction=reduction, center=center, scale=scale), 1e-9)
    weights = pairwise_weights(**tensors, **options)
    close(
        weights,
        [
            reference.group_weights(*row, **options)
            for row in zip(data["rewards"], data["scores"], data["valid"], strict=True)
        ],
        1e-9,
    )


@settings(max_examples=100, deadline=None)
@given(ragged_groups(), st.sampled_from(["grpo", "dr_grpo", "rloo"]))
def test_group_advantages_equal_the_loops(data: dict[str, Any], estimator: Any) -> None:
    rewards, valid = torch.tensor(data["rewards"], dtype=torch.float64), torch.tensor(data["valid"])
    found = group_advantages(rewards, estimator=estimator, valid=valid)
    close(found, reference.group_advantages(data["rewards"], data["valid"], estimator=estimator), 1e-9)


def test_weights_by_hand() -> None:
    rewards, scores = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = {  # sigmoid(log 3) = 3/4
        "uniform": [[0.0, 1.0], [1.0, 0.0]],
        "confidence": [[0.0, 0.75], [0.25, 0.0]],
        "agreement": [[0.0, 0.75], [0.75, 0.0]],
        "lambdarank": [[0.0, 0.25], [0.25, 0.0]],
    }
    for weighting, table in expected.items():
        close(pairwise_weights(rewards, scores, weighting=weighting, temperature=1.0)[0], table, 1e-6)  # type: ignore[arg-type]


def test_defaults_are_those_of_the_documentation() -> None:
    rewards, scores = groups()
    close(
        lambda_advantages(rewards, scores),
        reference.lambda_advantages(
            rewards.tolist(),
            scores.tolist(),
            [[True] * 6] * 5,
            weighting="confidence",
            temperature="group_std",
            reduction="mean",
            center=False,
            scale="none",
        ),
        1e-9,
    )


def test_reward_std_of_the_whole_batch_replaces_that_of_the_part() -> None:
    rewards, scores = groups(6)
    whole = lambda_advantages(rewards, scores, scale="batch")
    std = rewards.std()
    parts = [
        lambda_advantages(rewards[part], scores[part], scale="batch", reward_std=std)
        for part in (slice(0, 2), slice(2, 6))
    ]
    close(torch.cat(parts), whole)
    close(lambda_advantages(rewards, scores, scale="batch", reward_std=std.item()), whole)


# -- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_huge_score_gaps_give_finite_numbers(weighting: Any, dtype: torch.dtype) -> None:
    for size, temperature, reduction in itertools.product((2, 5), ("group_std", 1.0, 1e-50), REDUCTIONS):
        rewards = torch.tensor([[1.0, 0.0, 1.0, 0.5, 0.0][:size]], dtype=dtype)
        scores = torch.tensor([[1e4, -1e4, 1e4, 0.0, -1e4][:size]], dtype=dtype)
        found = lambda_advantages(
            rewards,
            scores,
            weighting=weighting,
            temperature=temperature,  # type: ignore[arg-type]
            reduction=reduction,  # type: ignore[arg-type]
            center=True,
            scale="group",
        )
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.isfinite().all()


def test_weighted_mean_without_weight_is_zero() -> None:
    # The first row's only weight is sigmoid(-1000) = 0; the second's is 1.
    found = lambda_advantages(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[-1000.0, 0.0]]), temperature=1.0, reduction="weighted_mean"
    )
    close(found, [[0.0, -1.0]])


@pytest.mark.parametrize("invalid", [False, True])
def test_equal_rewards_give_exact_zeros(invalid: bool) -> None:
    rewards = torch.full((2, 8), 0.3)  # their float32 mean is not 0.3
    rewards[1, 0] = 1.0
    valid = torch.ones_like(rewards, dtype=torch.bool)
    if invalid:  # the odd one out does not count
        rewards[0, 5], valid[0, 5] = 9.0, False
    scores = torch.linspace(-2, 0, 16).view(2, 8)
    for weighting, reduction, scale in itertools.product(WEIGHTINGS, REDUCTIONS, ("none", "group", "batch")):
        options: Any = {"weighting": weighting, "reduction": reduction, "scale": scale, "center": True}
        found = lambda_advantages(rewards, scores, valid=valid, **options)
        assert (found[0] == 0).all()
        assert (found[1] != 0).all()
    for estimator in ("grpo", "dr_grpo", "rloo"):
        found = group_advantages(rewards, estimator=estimator, valid=valid)
        assert (found[0] == 0).all()
        assert (found[1] != 0).all()


def test_groups_with_fewer_than_two_valid_rows_get_zeros() -> None:
    rewards, scores = torch.tensor([[1.0, 0.0, 2.0]] * 3), torch.tensor([[-1.0, -2.0, -0.5]] * 3)
    valid = torch.tensor([[False, True, False], [False, False, False], [True, True, False]])
    for found in (
        lambda_advantages(rewards, scores, valid=valid, center=True, scale="group"),
        group_advantages(rewards, estimator="grpo", valid=valid),
    ):
        assert (found[:2] == 0).all()
        assert found[2, 0] > 0 > found[2, 1]
        assert found[2, 2] == 0


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_junk_in_invalid_places_reaches_nothing(junk: float) -> None:
    rewards, scores = groups()
    valid = torch.ones_like(rewards, dtype=torch.bool)
    valid[0, 2] = valid[3, 0] = False
    dirty_rewards, dirty_scores = rewards.masked_fill(~valid, junk), scores.masked_fill(~valid, junk)
    for weighting, scale in itertools.product(WEIGHTINGS, ("none", "group", "batch")):
        options: Any = {"weighting": weighting, "scale": scale, "valid": valid}
        clean = lambda_advantages(rewards, scores, **options)
        assert torch.equal(lambda_advantages(dirty_rewards, dirty_scores, **options), clean)
        assert (clean[~valid] == 0).all()
    weights = pairwise_weights(dirty_rewards, dirty_scores, valid=valid)
    assert (weights[0, 2] == 0).all()
    assert (weights[0, :, 2] == 0).all()
    clean = group_advantages(rewards, estimator="grpo", valid=valid)
    assert torch.equal(group_advantages(dirty_rewards, estimator="grpo", valid=valid), clean)


def test_nothing_carries_gradient() -> None:
    rewards, scores = (tensor.requires_grad_() for tensor in groups())
    mask = torch.ones(5, 6, dtype=torch.bool)
    for result in (
        lambda_advantages(rewards, scores, scale="batch", reward_std=rewards.std()),
        pairwise_weights(rewards, scores),
        group_advantages(rewards, estimator="grpo"),
        sequence_scores(scores, mask),
    ):
        assert not result.requires_grad


def test_sequence_scores_equal_the_loops() -> None:
    logprobs = torch.tensor([[-1.0, -2.5, -0.25], [-3.0, math.nan, math.inf], [math.nan] * 3], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    for score, expected in (("sum", [-3.75, -3.0, 0.0]), ("mean", [-1.25, -3.0, 0.0])):
        found = sequence_scores(logprobs, mask, score=score)  # type: ignore[arg-type]
        close(found, expected)
        close(
            found,
            [
                reference.sequence_score(row, keep, score)
                for row, keep in zip(logprobs.tolist(), mask.bool().tolist(), strict=True)
            ],
        )
    assert torch.equal(sequence_scores(logprobs, mask), sequence_scores(logprobs, mask, score="mean"))
    assert sequence_scores(logprobs.half(), mask).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weighting": "softmax"},
            "`weighting` must be one of uniform, confidence, agreement, lambdarank, got 'softmax'",
        ),
        ({"reduction": "max"}, "`reduction` must be one of sum, mean, weighted_mean, got 'max'"),
        ({"scale": "std"}, "`scale` must be one of none, group, batch, got 'std'"),
        ({"temperature": 0.0}, "`temperature` must be a finite number above 0"),
        ({"temperature": math.inf}, "`temperature` must be a finite number above 0"),
        ({"temperature": math.nan}, "`temperature` must be a finite number above 0"),
        ({"temperature": "std"}, "`temperature` must be a finite number above 0"),
        ({"scores": torch.zeros(5, 4)}, "Shapes must agree"),
        ({"valid": torch.ones(5, 1, dtype=torch.bool)}, "Shapes must agree"),
        ({"rewards": torch.zeros(5, 1), "scores": torch.zeros(5, 1)}, "`group_size` must be at least 2, got 1"),
        ({"rewards": torch.zeros(6), "scores": torch.zeros(6)}, r"must have shape \(B, G\)"),
        ({"rewards": torch.full((5, 6), math.nan)}, r"`rewards` must be finite where valid, got nan at \(0, 0\)"),
        ({"scores": torch.full((5, 6), -math.inf)}, r"`scores` must be finite where valid, got -inf at \(0, 0\)"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    rewards, scores = groups()
    with pytest.raises(ValueError, match=message):
        lambda_advantages(**{"rewards": rewards, "scores": scores, **options})


def test_bad_temperature_is_an_error_under_uniform_weights_too() -> None:
    with pytest.raises(ValueError, match="temperature"):
        pairwise_weights(*groups(), weighting="uniform", temperature=-1.0)


def test_bad_estimator_and_score_are_named() -> None:
    with pytest.raises(ValueError, match="`estimator` must be one of grpo, dr_grpo, rloo, got 'lambda'"):
        group_advantages(groups()[0], estimator="lambda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`score` must be one of mean, sum, got 'max'"):
        sequence_scores(torch.zeros(1, 1), torch.ones(1, 1), score="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Shapes must agree"):
        sequence_scores(torch.zeros(1, 2), torch.ones(1, 1))
