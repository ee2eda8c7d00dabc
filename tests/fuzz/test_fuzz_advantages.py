"""Advantages and weights over arbitrary groups, in every float type and under every setting."""

import math
from typing import Any, get_args

import pytest
import torch
from fuzz.fuzzing import fuzz
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lambdapo.functional import (
    completion_mask,
    group_advantages,
    lambda_advantages,
    masked_mean,
    masked_sum,
    pairwise_weights,
    sequence_scores,
)
from lightning_lambdapo.functional.advantages import GroupEstimator, Reduction, Scale, Weighting

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
rewards_of_a_row = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.1]), st.floats(-10, 10), st.sampled_from([1e4, -1e4, 1e-30, -0.0])
)
scores_of_a_row = st.one_of(st.sampled_from([0.0, -1.0, 1e4, -1e4]), st.floats(-30, 0), st.floats(-1e4, 1e4))
temperatures = st.one_of(
    st.just("group_std"), st.floats(0.01, 100), st.sampled_from([1, 1e-320, 5e-324, 1e300, 10**30])
)
settings_of_lambda = st.fixed_dictionaries(
    {
        "weighting": st.sampled_from(get_args(Weighting)),
        "temperature": temperatures,
        "reduction": st.sampled_from(get_args(Reduction)),
        "center": st.booleans(),
        "scale": st.sampled_from(get_args(Scale)),
    }
)


@st.composite
def groups(draw: st.DrawFn, types: list[torch.dtype] = TYPES) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, scores and validity of up to three groups of two to six rows."""
    batch, size = draw(st.integers(0, 3)), draw(st.integers(2, 6))

    def tensor(values: st.SearchStrategy[Any], dtype: torch.dtype) -> Tensor:
        drawn = draw(st.lists(values, min_size=batch * size, max_size=batch * size))
        return torch.tensor(drawn, dtype=torch.float64).to(dtype).view(batch, size)

    rewards = tensor(rewards_of_a_row, draw(st.sampled_from(types)))
    scores = tensor(scores_of_a_row, draw(st.sampled_from(types)))
    return rewards, scores, tensor(st.sampled_from([True, True, True, False]), torch.bool)


def estimates(rewards: Tensor, scores: Tensor, options: dict[str, Any], **more: Any) -> list[Tensor]:
    """Under the given settings, and the baselines."""
    return [
        lambda_advantages(rewards, scores, **options, **more),
        *(group_advantages(rewards, estimator=estimator, **more) for estimator in get_args(GroupEstimator)),
    ]


@fuzz(200)
@given(groups(), settings_of_lambda)
def test_advantages_are_finite_and_zero_where_they_must_be(
    group: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
) -> None:
    rewards, scores, valid = group
    for found in estimates(rewards, scores, options, valid=valid):
        assert found.shape == rewards.shape
        assert found.dtype in {torch.float32, torch.float64}
        assert found.isfinite().all()
        assert not found.requires_grad
        assert (found[~valid] == 0).all()
        assert (found[valid.sum(-1) < 2] == 0).all()
    equal = torch.where(valid, rewards[:, :1].expand_as(rewards), rewards)
    for found in estimates(equal, scores, options, valid=valid):
        assert (found == 0).all()


@fuzz(200)
@given(groups(), st.sampled_from(get_args(Weighting)), temperatures)
def test_weights_are_shares(group: tuple[Tensor, Tensor, Tensor], weighting: Weighting, temperature: Any) -> None:
    rewards, scores, valid = group
    weights = pairwise_weights(rewards, scores, weighting=weighting, temperature=temperature, valid=valid)
    assert weights.shape == (*rewards.shape, rewards.shape[1])
    assert ((weights >= 0) & (weights <= 1)).all()
    pairs = valid[:, :, None] & valid[:, None, :] & ~torch.eye(rewards.shape[1], dtype=torch.bool)
    assert (weights[~pairs] == 0).all()
    if weighting == "confidence":
        both = (weights + weights.transpose(1, 2))[pairs]
        torch.testing.assert_close(both, torch.ones_like(both), atol=1e-6, rtol=0)
    else:
        torch.testing.assert_close(weights, weights.transpose(1, 2))


@fuzz(200)
@given(groups(), settings_of_lambda, st.data())
def test_invalid_rows_have_no_influence(
    group: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], data: st.DataObject
) -> None:
    rewards, scores, valid = group
    junk = st.floats(width=16) | st.sampled_from([math.nan, math.inf, 65504.0])
    others = [torch.where(valid, values, data.draw(junk)).to(values.dtype) for values in (rewards, scores)]
    before = estimates(rewards, scores, options, valid=valid)
    after = estimates(others[0], others[1], options, valid=valid)
    assert all(map(torch.equal, before, after))


@fuzz(150)
@given(groups([torch.float64]), settings_of_lambda, st.randoms(use_true_random=False))
def test_a_permuted_group_has_permuted_advantages(
    group: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], random: Any
) -> None:
    rewards, scores, valid = group
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    plain = estimates(rewards, scores, options, valid=valid)
    permuted = estimates(rewards[:, order], scores[:, order], options, valid=valid[:, order])
    assume(options["temperature"] == "group_std" or options["temperature"] > 1e-3)
    for before, after in zip(plain, permuted, strict=True):
        torch.testing.assert_close(after, before[:, order], atol=1e-7, rtol=1e-7)


@fuzz(150)
@given(groups([torch.float64]), settings_of_lambda, st.floats(-100, 100))
def test_a_constant_added_to_rewards_changes_nothing(
    group: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], constant: float
) -> None:
    rewards, scores, valid = group
    # Whole thousandths: a difference that rounding makes or removes flips a sign and with it a weight.
    rewards = (rewards * 1000).round() / 1024
    constant = round(constant * 1000) / 1024
    plain = estimates(rewards, scores, options, valid=valid)
    shifted = estimates(rewards + constant, scores, options, valid=valid)
    for before, after in zip(plain, shifted, strict=True):
        torch.testing.assert_close(after, before, atol=1e-7, rtol=1e-7)


@fuzz(100)
@given(groups([torch.float64]), st.sampled_from(["uniform", "agreement", "lambdarank"]), temperatures)
def test_symmetric_weights_and_baselines_sum_to_zero(
    group: tuple[Tensor, Tensor, Tensor], weighting: Weighting, temperature: Any
) -> None:
    rewards, scores, valid = group
    options = {"weighting": weighting, "temperature": temperature, "reduction": "mean"}
    for found in estimates(rewards, scores, options, valid=valid):
        size = found.abs().sum(-1).clamp(min=1)
        torch.testing.assert_close(found.sum(-1) / size, torch.zeros(len(found), dtype=found.dtype), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_whose_squares_overflow_are_refused(dtype: torch.dtype) -> None:
    fine, large = torch.tensor([[1.0, 0.0]], dtype=dtype), torch.tensor([[1e30, 0.0]], dtype=dtype)
    with pytest.raises(
        ValueError, match=r"`rewards` must be finite .* \(0, 0\)\. Its square does not fit torch\.float32"
    ):
        lambda_advantages(large, fine)
    with pytest.raises(ValueError, match=r"`scores` must be finite where valid.*keep it below 2e\+16"):
        pairwise_weights(fine, large)
    with pytest.raises(ValueError, match="Its square does not fit"):
        group_advantages(large, estimator="grpo")
    assert lambda_advantages(large.double(), fine).isfinite().all()
    largest = torch.full((2, 64), 1e16, dtype=dtype) * torch.tensor([1.0, -1.0]).repeat(32)
    for scale in get_args(Scale):
        assert lambda_advantages(largest, largest, scale=scale).isfinite().all()
    assert group_advantages(largest, estimator="grpo").isfinite().all()


@pytest.mark.parametrize("temperature", [10**400, -(10**400), math.nan, 0, -1e-9])
def test_temperatures_that_no_float_holds_are_refused(temperature: Any) -> None:
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match="`temperature` must be a finite number above 0"):
        lambda_advantages(ones, ones, temperature=temperature)


@fuzz(100)
@given(st.integers(0, 4), st.integers(0, 5), st.sampled_from(TYPES), st.randoms(use_true_random=False))
@example(0, 0, torch.float32, None)
def test_scores_and_masked_sums_ignore_what_is_masked(rows: int, length: int, dtype: torch.dtype, random: Any) -> None:
    generator = torch.Generator().manual_seed(random.randrange(10**6) if random else 0)
    values = (torch.randn(rows, length, generator=generator) * 100).to(dtype)
    mask = torch.rand(rows, length, generator=generator) > 0.4
    junk = torch.where(mask, values, torch.tensor([math.nan, math.inf])[torch.randint(2, (rows, length))].to(dtype))
    for score in ("mean", "sum"):
        found = sequence_scores(junk, mask, score=score)
        assert found.shape == (rows,)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.isfinite().all()
        assert torch.equal(found, sequence_scores(values, mask, score=score))
        assert (found[~mask.any(-1)] == 0).all()
    for reduce in (masked_sum, masked_mean):
        assert reduce(junk, mask).shape == ()
        assert reduce(junk, mask, -1).isfinite().all()
        assert torch.equal(reduce(junk, mask, 0), reduce(values, mask, 0))
    mean, kept = masked_mean(values.double(), mask), values.double()[mask]
    assert kept.min() - 1e-9 <= mean <= kept.max() + 1e-9 if len(kept) else mean == 0


@fuzz(100)
@given(
    st.integers(0, 6).flatmap(lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1)),
    st.integers(0, 4) | st.lists(st.integers(-1, 9), min_size=1, max_size=4),
)
def test_completions_end_at_their_first_end(ids: list[list[int]], eos: int | list[int]) -> None:
    mask = completion_mask(torch.tensor(ids, dtype=torch.int64).view(len(ids), -1), eos)
    ends = [eos] if isinstance(eos, int) else eos
    for row, found in zip(ids, mask.tolist(), strict=True):
        length = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        assert found == [True] * length + [False] * (len(row) - length)
