"""Importance correction of the sampler: numbers worked by hand, the loop twin, parts of a step, junk, edges."""

import itertools
import math
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from lightning_lambdapo.functional import ImportanceStatistics, importance_weights, policy_loss

NAMES = ImportanceStatistics.__slots__
CORRECTIONS = list(itertools.product(("truncate", "mask"), ("token", "sequence")))

#: Two rows, on-policy. Ratios 0.5, 1, 1.5, 4 (product 3) with advantage 1, and 1.5, 1 (product 1.5) with advantage -3.
RATIOS = torch.tensor([[0.5, 1.0, 1.5, 4.0], [1.5, 1.0, 1.0, 1.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
ADVANTAGES = torch.tensor([1.0, -3.0], dtype=torch.float64)
LOGPROBS = torch.tensor([[-1.0, -0.5, -2.0, -0.25], [-3.0, -1.5, 0.0, 0.0]], dtype=torch.float64)
BEHAVIOR = LOGPROBS - RATIOS.log()
WEIGHTS = {
    ("truncate", "token"): [[0.5, 1.0, 1.5, 2.0], [1.5, 1.0, 0.0, 0.0]],
    ("mask", "token"): [[0.5, 1.0, 1.5, 0.0], [1.5, 1.0, 0.0, 0.0]],  # 0.5 is 1 / cap, which is still inside
    ("truncate", "sequence"): [[2.0] * 4, [1.5, 1.5, 0.0, 0.0]],
    ("mask", "sequence"): [[0.0] * 4, [1.5, 1.5, 0.0, 0.0]],
}
#: The surrogate is -(sum of weights of row 0 - 3 * sum of row 1): over 6 tokens, as row means over 2 rows, over 2 * 8.
LOSSES = {
    ("truncate", "token"): {"token": 2.5 / 6, "sequence": (-5 / 4 + 3 * 2.5 / 2) / 2, "constant": 2.5 / 16},
    ("mask", "token"): {"token": 4.5 / 6, "sequence": (-3 / 4 + 3 * 2.5 / 2) / 2, "constant": 4.5 / 16},
    ("truncate", "sequence"): {"token": 1 / 6, "sequence": (-2 + 4.5) / 2, "constant": 1 / 16},
    ("mask", "sequence"): {"token": 9 / 6, "sequence": 4.5 / 2, "constant": 9 / 16},
}
KL_SUM = 9.5 - 6 - math.log(0.5 * 1.5 * 4 * 1.5)  # sum of r - 1 - log r over 6 tokens
STATISTICS = {
    ("truncate", "token"): (6, 6, 9.5, 4.0, 7.5, 0.25 + 1 + 2.25 + 4 + 2.25 + 1, 1, 6, KL_SUM),
    ("mask", "token"): (6, 6, 9.5, 4.0, 5.5, 0.25 + 1 + 2.25 + 2.25 + 1, 1, 6, KL_SUM),
    ("truncate", "sequence"): (2, 2, 4.5, 3.0, 3.5, 4 + 2.25, 1, 6, KL_SUM),
    ("mask", "sequence"): (2, 2, 4.5, 3.0, 1.5, 2.25, 1, 6, KL_SUM),
}


def batch(rows: int = 8, width: int = 7, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Ragged rows, one of them empty; policy, policy before, sampler and reference all differ."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, width)
    logprobs = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    old, ref, behavior = (
        logprobs + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    lengths[0], lengths[2], lengths[3] = width, 0, 1
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    tensors = {"logprobs": logprobs, "old_logprobs": old, "ref_logprobs": ref, "behavior_logprobs": behavior}
    return {
        **{name: tensor.to(dtype) for name, tensor in tensors.items()},
        "advantages": advantages.to(dtype),
        "mask": torch.arange(width) < lengths,
    }


def settings(correction: str, level: str, cap: float = 2.0) -> dict[str, Any]:
    return {"importance_correction": correction, "importance_correction_level": level, "importance_cap": cap}


def loss_and_gradient(tensors: dict[str, Any], **options: Any) -> tuple[Any, Tensor]:
    leaf = tensors["logprobs"].clone().requires_grad_()
    output = policy_loss(**{**tensors, "logprobs": leaf}, **options)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, gradient


def sums(statistics: ImportanceStatistics | None) -> list[float]:
    assert statistics is not None
    return [getattr(statistics, name).item() for name in NAMES]


# -- numbers worked by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_loss_and_gradient_by_hand(correction: Any, level: Any, aggregation: Any) -> None:
    tensors = {"logprobs": LOGPROBS, "old_logprobs": LOGPROBS, "advantages": ADVANTAGES, "mask": MASK}
    options = settings(correction, level) | {"aggregation": aggregation, "max_new_tokens": 8}
    output, gradient = loss_and_gradient(
        {**tensors, "ref_logprobs": None}, behavior_logprobs=BEHAVIOR, clip_low=0.1, clip_high=0.1, **options
    )
    assert output.loss.item() == pytest.approx(LOSSES[correction, level][aggregation], abs=1e-12)
    per_token = {"token": [1 / 6] * 2, "sequence": [1 / 8, 1 / 4], "constant": [1 / 16] * 2}[aggregation]
    share = torch.tensor(per_token, dtype=torch.float64)[:, None]
    expected = -torch.tensor(WEIGHTS[correction, level], dtype=torch.float64) * ADVANTAGES[:, None] * share
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    # The KL term (k2 of a difference of 0.2 is 0.02) is added as it is, without a weight.
    output, with_kl = loss_and_gradient(
        {**tensors, "ref_logprobs": LOGPROBS + 0.2}, behavior_logprobs=BEHAVIOR, kl_coef=0.5, kl="k2", **options
    )
    kl = 0.5 * 0.02 * (1 if aggregation != "constant" else 6 / 16)
    assert output.loss.item() == pytest.approx(LOSSES[correction, level][aggregation] + kl, abs=1e-12)
    assert output.mean_kl.item() == pytest.approx(0.02)
    torch.testing.assert_close(with_kl - gradient, -0.5 * 0.2 * share * MASK, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
def test_weights_and_sums_by_hand(correction: Any, level: Any) -> None:
    weights, statistics = importance_weights(LOGPROBS, BEHAVIOR, MASK, correction=correction, level=level, cap=2.0)
    expected = torch.tensor(WEIGHTS[correction, level], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    assert sums(statistics) == pytest.approx(STATISTICS[correction, level], abs=1e-12)


def test_mask_drops_ratios_below_the_inverse_of_the_cap() -> None:
    old = torch.tensor([[0.4, 0.5, 2.0, 2.1]], dtype=torch.float64).log()
    weights, statistics = importance_weights(old, torch.zeros_like(old), torch.ones(1, 4), correction="mask", cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.5, 2.0, 0.0]], dtype=torch.float64))
    assert statistics.capped.item() == 2
    weights, statistics = importance_weights(old, torch.zeros_like(old), torch.ones(1, 4), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.5, 2.0, 2.0]], dtype=torch.float64))
    assert statistics.capped.item() == 1


def test_defaults_are_truncation_of_tokens_at_two() -> None:
    tensors = batch()
    explicit = policy_loss(**tensors, **settings("truncate", "token", 2.0))
    assert policy_loss(**tensors).loss.item() == explicit.loss.item()
    assert sums(policy_loss(**tensors).importance) == sums(explicit.importance)


# -- the loop twin --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_equals_the_loops(correction: str, level: str, aggregation: str, ratio_level: str) -> None:
    capped = 0.0
    for seed in range(5):
        tensors = batch(seed=seed)
        lists = {name: tensor.tolist() for name, tensor in tensors.items()}
        behavior = lists.pop("behavior_logprobs")
        weights, expected = reference.importance_weights(
            lists["old_logprobs"], behavior, lists["mask"], correction=correction, cap=1.6, level=level
        )
        options: dict[str, Any] = {
            "clip_low": 0.15, "clip_high": 0.28, "level": ratio_level, "kl_coef": 0.3, "kl": "k3",
            "aggregation": aggregation, "max_new_tokens": 9,
        }  # fmt: skip
        output = policy_loss(**tensors, **options, **settings(correction, level, 1.6))
        slow = reference.policy_loss(**lists, **options, weights=weights)
        for name, value in slow.items():
            assert getattr(output, name).item() == pytest.approx(value, abs=1e-12), name
        assert output.importance is not None
        for name, value in expected.items():
            assert getattr(output.importance, name).item() == pytest.approx(value, rel=1e-12), name
        capped += expected["capped"] / expected["count"]
    assert 0 < capped < 5


# -- what the weight is not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
def test_the_weight_is_a_constant(correction: str, level: str) -> None:
    """Also where the caller passes log-probabilities with a gradient as those before the update."""
    tensors = batch()
    leaf = tensors["logprobs"].clone().requires_grad_()
    behavior = tensors["behavior_logprobs"].clone().requires_grad_()
    given = {**tensors, "logprobs": leaf, "old_logprobs": leaf, "behavior_logprobs": behavior}
    output = policy_loss(**given, **settings(correction, level))
    (found,) = torch.autograd.grad(output.loss, leaf)
    _, expected = loss_and_gradient({**tensors, "old_logprobs": tensors["logprobs"]}, **settings(correction, level))
    assert torch.equal(found, expected)
    assert not any(getattr(output.importance, name).requires_grad for name in NAMES)


@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
def test_the_kl_term_has_no_weight(correction: str, level: str) -> None:
    tensors = batch()
    tensors["advantages"] = torch.zeros_like(tensors["advantages"])
    _, found = loss_and_gradient(tensors, kl_coef=0.3, **settings(correction, level))
    _, expected = loss_and_gradient(tensors | {"behavior_logprobs": None}, kl_coef=0.3)
    assert torch.equal(found, expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_exact_sampler_changes_no_bit(correction: str, level: str, dtype: torch.dtype) -> None:
    tensors = batch(dtype=dtype)
    exact = tensors | {"behavior_logprobs": tensors["old_logprobs"]}
    output, found = loss_and_gradient(exact, kl_coef=0.1, **settings(correction, level))
    plain, expected = loss_and_gradient(exact | {"behavior_logprobs": None}, kl_coef=0.1)
    assert torch.equal(found, expected)
    assert torch.equal(output.loss, plain.loss)
    assert plain.importance is None
    count = output.importance.count.item()
    tokens = int(tensors["mask"].sum())
    assert sums(output.importance) == [count, count, count, 1.0, count, count, 0, tokens, 0.0]


def test_without_a_cap_the_weight_is_the_ratio() -> None:
    tensors = batch()
    given = tensors["old_logprobs"], tensors["behavior_logprobs"], tensors["mask"]
    for correction in ("truncate", "mask"):
        weights, statistics = importance_weights(*given, correction=correction, cap=math.inf)
        expected = torch.where(given[2], (given[0] - given[1]).exp(), 0.0)
        torch.testing.assert_close(weights, expected)
        assert statistics.capped.item() == 0


# -- one step, however it is split ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_parts_of_a_step_add_up_to_the_step(correction: str, level: str, aggregation: str) -> None:
    tensors = batch()
    options = settings(correction, level) | {"aggregation": aggregation, "max_new_tokens": 9, "kl_coef": 0.1}
    whole, gradient = loss_and_gradient(tensors, **options)
    counts = {"token_count": int(tensors["mask"].sum()), "row_count": int(tensors["mask"].any(-1).sum())}
    for parts in ([[5, 0], [1, 2, 3], [4, 6, 7]], [[row] for row in range(8)], [[2], [7, 6, 5, 4, 3, 1, 0]]):
        pieces, found, largest = torch.zeros_like(gradient), [0.0] * len(NAMES), 0.0
        for rows in parts:
            part = {name: tensor[rows] for name, tensor in tensors.items()}
            width = max(int(part["mask"].sum(-1).max()), 1)  # trimmed, as a micro-batch is
            part = {name: tensor[:, :width] if tensor.ndim == 2 else tensor for name, tensor in part.items()}
            output, piece = loss_and_gradient(part, **options, **counts)
            pieces[rows, :width] += piece
            found = [a + b for a, b in zip(found, sums(output.importance), strict=True)]
            largest = max(largest, output.importance.ratio_max.item())
        found[NAMES.index("ratio_max")] = largest
        torch.testing.assert_close(pieces, gradient, atol=1e-12, rtol=0.0)
        assert found == pytest.approx(sums(whole.importance), rel=1e-12)


# -- junk and edges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
def test_junk_in_masked_places_changes_nothing(correction: str, level: str, junk: float) -> None:
    tensors = batch()
    output, gradient = loss_and_gradient(tensors, **settings(correction, level))
    dirty = tensors | {"behavior_logprobs": tensors["behavior_logprobs"].masked_fill(~tensors["mask"], junk)}
    found, dirty_gradient = loss_and_gradient(dirty, **settings(correction, level))
    assert torch.equal(dirty_gradient, gradient)
    assert sums(found.importance) == sums(output.importance)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
def test_a_ratio_that_is_not_finite_counts_for_nothing(correction: str, level: str, junk: float) -> None:
    """Its token, or its row at the level of sequences, has weight 0. Everything else is as without it."""
    tensors = batch()
    dirty = tensors | {"behavior_logprobs": tensors["behavior_logprobs"].clone()}
    dirty["behavior_logprobs"][0, 3] = junk
    counts = {"token_count": 30, "row_count": 7, "kl_coef": 0.2, **settings(correction, level)}
    clean, expected = loss_and_gradient(tensors, **counts)
    output, found = loss_and_gradient(dirty, **counts)
    _, penalty = loss_and_gradient(dirty | {"advantages": torch.zeros_like(tensors["advantages"])}, **counts)
    hit = torch.zeros_like(tensors["mask"])
    hit[0, 3 if level == "token" else slice(None)] = True
    assert output.loss.isfinite()
    assert torch.equal(found[~hit], expected[~hit])
    assert torch.equal(found[hit], penalty[hit]), "the KL term remains"
    assert all(math.isfinite(value) for value in sums(output.importance))
    assert output.importance.count.item() == clean.importance.count.item()
    assert output.importance.finite.item() == clean.importance.finite.item() - 1
    assert output.importance.kl_tokens.item() == clean.importance.kl_tokens.item() - 1


def test_a_policy_that_is_not_finite_is_not_hidden() -> None:
    tensors = batch()
    tensors["logprobs"][0, 3] = math.nan
    tensors["old_logprobs"] = tensors["logprobs"]
    assert policy_loss(**tensors).loss.isnan()


def test_huge_ratios_overflow_nothing() -> None:
    logprobs = torch.zeros(2, 40)
    behavior = torch.full_like(logprobs, -50.0)
    for correction, level in CORRECTIONS:
        output = policy_loss(
            *(logprobs, logprobs, None, torch.ones(2), torch.ones(2, 40)),
            behavior_logprobs=behavior,
            **settings(correction, level),
        )
        assert output.loss.item() == (-2.0 if correction == "truncate" else 0.0)
        assert all(math.isfinite(value) for value in sums(output.importance))


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)])
@pytest.mark.parametrize(("correction", "level"), CORRECTIONS)
def test_no_masked_token_gives_empty_sums(correction: Any, level: Any, shape: tuple[int, int]) -> None:
    junk = torch.full(shape, math.nan)
    weights, statistics = importance_weights(
        junk, junk, torch.zeros(shape, dtype=torch.bool), correction=correction, level=level
    )
    assert weights.shape == shape
    assert not weights.any()
    assert sums(statistics) == [0.0] * len(NAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_raised_first(dtype: torch.dtype) -> None:
    """In bfloat16 a log-probability of -20 has steps of 0.125, so the difference itself must be taken above."""
    old, behavior = torch.tensor([[-20.03, -3.0]]), torch.tensor([[-20.0, -3.01]]).to(dtype)
    mask = torch.ones(1, 2).bool()
    weights, _ = importance_weights(old, behavior, mask)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, (old.double() - behavior.double()).exp().float())
    with torch.autocast("cpu", torch.bfloat16):
        again, statistics = importance_weights(old, behavior, mask)
    assert torch.equal(again, weights)
    assert statistics.kl_sum.dtype == torch.float32
    assert importance_weights(old.double(), behavior, mask)[0].dtype == torch.float64


def test_the_kl_stays_exact_for_small_differences() -> None:
    # exp(d) - 1 - d cancels in float32: 0 or 1e-7 here, where it is d^2 / 2.
    old = torch.full((1, 1), 1e-4)
    _, statistics = importance_weights(old, torch.zeros(1, 1), torch.ones(1, 1))
    assert statistics.kl_sum.item() == pytest.approx(5e-9, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_correction": "clip"}, "`importance_correction` must be one of truncate, mask, got 'clip'"),
        ({"importance_correction_level": "row"}, "`importance_correction_level` must be one of token, sequence"),
        ({"importance_cap": 1.0}, "`importance_cap` must be above 1, got 1.0"),
        ({"importance_cap": math.nan}, "`importance_cap` must be above 1, got nan"),
        ({"behavior_logprobs": torch.zeros(8, 6)}, "Shapes must agree"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**batch(), **options})
