"""The gradient of the policy loss against what is derived by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lambdapo.functional import policy_loss

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
TOKENS = 6
#: what one token of each row weighs in the loss
TOKEN_WEIGHTS = {"token": [1 / 6] * 3, "sequence": [1 / 9, 1 / 3, 1 / 6], "constant": [1 / 24] * 3}


def gradient(log_ratio: Tensor, advantages: Tensor, *, ref: Tensor | None = None, **options: Any) -> Tensor:
    """Of the loss at ``logprobs = -1 + log_ratio``, ``old_logprobs = -1``; ``ref`` is relative to ``logprobs``."""
    logprobs = (log_ratio.double() - 1).requires_grad_()
    old = torch.full_like(logprobs, -1.0)
    loss = policy_loss(
        logprobs, old, None if ref is None else (logprobs + ref).detach(), advantages.double(), MASK, **options
    ).loss
    return torch.autograd.grad(loss, logprobs)[0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", TOKEN_WEIGHTS)
def test_on_policy_gradient_is_minus_the_advantage(aggregation: Any, level: Any) -> None:
    advantages = torch.tensor([1.5, -2.0, 0.25], dtype=torch.float64)
    found = gradient(torch.zeros(3, 3), advantages, aggregation=aggregation, level=level, max_new_tokens=8)
    weight = torch.tensor(TOKEN_WEIGHTS[aggregation], dtype=torch.float64)
    close(found, (-advantages * weight).unsqueeze(-1) * MASK)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (0.5, 1.0, -0.5),  # below the range, pushed up: -ratio A
        (1.0, 1.0, -1.0),
        (1.5, 1.0, 0.0),  # above the range, pushed up further: clipped
        (0.5, -1.0, 0.0),  # below the range, pushed down further: clipped
        (1.0, -1.0, 1.0),
        (1.5, -1.0, 1.5),
        (1.25, 1.0, -1.25),  # the range is [0.9, 1.3]
        (1.35, 1.0, 0.0),
        (0.95, -1.0, 0.95),
        (0.85, -1.0, 0.0),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_by_ratio_and_sign(ratio: float, advantage: float, expected: float, level: Any) -> None:
    found = gradient(
        torch.full((3, 3), math.log(ratio), dtype=torch.float64),
        torch.full((3,), advantage),
        level=level,
        clip_low=0.1,
        clip_high=0.3,
    )
    close(found, expected / TOKENS * MASK.double())


def test_sequence_ratio_is_the_geometric_mean() -> None:
    log_ratio = torch.tensor([[0.1, -0.2, 0.04], [0.15, 9.0, 9.0], [-0.1, 0.05, 9.0]], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    ratios = torch.tensor([math.exp(-0.02), math.exp(0.15), math.exp(-0.025)], dtype=torch.float64)
    close(gradient(log_ratio, advantages, level="sequence"), (-ratios * advantages / TOKENS).unsqueeze(-1) * MASK)
    token_ratios = log_ratio.exp()
    close(gradient(log_ratio, advantages), (-token_ratios * advantages.unsqueeze(-1) / TOKENS).where(MASK, 0.0))


@pytest.mark.parametrize("aggregation", TOKEN_WEIGHTS)
def test_kl_gradients(aggregation: Any) -> None:
    d = torch.tensor([[0.5, -0.25, 0.0], [1.0, 9.0, 9.0], [-2.0, 0.1, 9.0]], dtype=torch.float64)
    weight = torch.tensor(TOKEN_WEIGHTS[aggregation], dtype=torch.float64).unsqueeze(-1)
    # d = ref - logp, so d' = -1: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1
    for kl, expected in (("k1", torch.ones_like(d)), ("k2", -d), ("k3", 1 - d.exp())):
        found = gradient(
            torch.zeros(3, 3), torch.zeros(3), ref=d, kl=kl, kl_coef=0.4, aggregation=aggregation, max_new_tokens=8
        )
        close(found, (0.4 * weight * expected).where(MASK, 0.0))


def test_kl_is_zero_and_flat_at_the_reference_but_for_k1() -> None:
    for kl, slope in (("k1", 1.0), ("k2", 0.0), ("k3", 0.0)):
        found = gradient(torch.zeros(3, 3), torch.zeros(3), ref=torch.zeros(3, 3), kl=kl, kl_coef=1.0)
        close(found, slope / TOKENS * MASK.double())


def test_k3_stays_exact_next_to_the_reference() -> None:
    # exp(d) - d - 1 cancels in float32: 0 or 1e-7 here, where it is d^2 / 2.
    d = 1e-4
    logprobs = torch.zeros(1, 1)
    output = policy_loss(logprobs, logprobs, logprobs + d, torch.zeros(1), torch.ones(1, 1), kl="k3")
    assert output.mean_kl is not None
    assert output.mean_kl.item() == pytest.approx(d * d / 2, rel=0.01)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", TOKEN_WEIGHTS)
def test_rows_of_zero_advantage_have_no_gradient_and_still_count(aggregation: Any, level: Any) -> None:
    options: Any = {"aggregation": aggregation, "level": level, "max_new_tokens": 8}
    log_ratio = torch.tensor([[0.3, -0.9, 2.0], [0.1, 0.0, 0.0], [-3.0, 0.4, 0.0]])
    found = gradient(log_ratio, torch.tensor([0.0, 1.0, 0.0]), **options)
    assert (found[[0, 2]] == 0).all()
    weight = TOKEN_WEIGHTS[aggregation][1]
    assert found[1, 0].item() == pytest.approx(-math.exp(0.1) * weight, rel=1e-6)


def test_old_and_reference_logprobs_are_constants() -> None:
    logprobs, old, ref = (torch.full((3, 3), value, requires_grad=True) for value in (-1.0, -1.1, -0.9))
    advantages = torch.ones(3, requires_grad=True)
    policy_loss(logprobs, old, ref, advantages, MASK, kl_coef=0.1).loss.backward()
    assert logprobs.grad is not None
    assert old.grad is ref.grad is advantages.grad is None
