"""Statistics and log-probabilities are the same to the bit under autocast. Only the model's products may round."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lambdapo import functional
from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.functional import (
    chunked_logprobs,
    completion_mask,
    embedding_density,
    group_advantages,
    importance_weights,
    lambda_advantages,
    logprobs_from_logits,
    masked_mean,
    masked_sum,
    pairwise_weights,
    policy_loss,
    sequence_scores,
)
from lightning_lambdapo.rollout.sampling import TokenSampler, inverse_cdf

N, T, V = 6, 9, 31
GENERATOR = torch.Generator().manual_seed(5)
VALUES, OLD, REF = (torch.randn(N, T, generator=GENERATOR) - 2 for _ in range(3))
LOGITS = torch.randn(N, V, generator=GENERATOR) * 3
EMBEDDINGS = torch.randn(N, T, V, generator=GENERATOR)
MASK = torch.rand(N, T, generator=GENERATOR) < 0.8
TARGETS = torch.randint(V, (N,), generator=GENERATOR)
SHIFT = torch.linspace(-1.0, 1.0, V)
FLAT = torch.rand(V, generator=GENERATOR) + 0.5

Values = dict[str, Tensor]


def loss(values: Tensor, **settings: Any) -> Values:
    found = policy_loss(values, OLD, REF, SHIFT[:N], MASK, kl_coef=0.1, **settings)
    assert found.mean_kl is not None
    return {"loss": found.loss, "kl": found.mean_kl, "clip": found.clip_fraction, "ratio": found.ratio_max}


def head_of_pointwise_operators(hidden: Tensor) -> Tensor:
    """A head that autocast does not touch, unlike a real one: what is left is this package's own arithmetic."""
    return torch.tanh(hidden * FLAT) * 5


def chunked(values: Tensor, **settings: Any) -> Values:
    found, entropy = chunked_logprobs(
        values, TARGETS, head_of_pointwise_operators, temperature=0.7, chunk_size=4, entropy=True, **settings
    )
    assert entropy is not None
    return {"logprobs": found, "entropy": entropy}


def sample(values: Tensor, **settings: Any) -> Values:
    """The token sampler has no gradient, so it gets values without one."""
    uniforms = torch.linspace(0.05, 1, N).double()[:, None]
    sampler = TokenSampler(SamplingConfig(**settings), uniforms, TARGETS[:, None], torch.ones(N, 1).bool())
    return dict(zip(("tokens", "logprobs", "entropy"), sampler(values.detach(), torch.arange(N), 0), strict=True))


CASES: dict[str, tuple[Tensor, Callable[[Tensor], Any]]] = {
    "chunked_logprobs": (LOGITS, chunked),
    "chunked_logprobs: ahead": (LOGITS, lambda x: chunked(x, recompute=False)),
    "completion_mask": (VALUES, lambda x: completion_mask(x.long(), [-1, -3])),
    "embedding_density": (EMBEDDINGS, lambda x: embedding_density(x, MASK, EMBEDDINGS.roll(1, 0), MASK)._asdict()),
    "group_advantages": (VALUES, lambda x: group_advantages(x, estimator="grpo", valid=MASK)),
    "importance_weights": (VALUES, lambda x: importance_weights(x, OLD, MASK)[0]),
    "importance_weights: rows": (VALUES, lambda x: importance_weights(x, OLD, MASK, level="sequence")[0]),
    "lambda_advantages": (VALUES, lambda x: lambda_advantages(OLD, x, scale="batch", center=True, valid=MASK)),
    "logprobs_from_logits": (LOGITS, lambda x: logprobs_from_logits(x, TARGETS, temperature=0.7)),
    "masked_mean": (VALUES, lambda x: masked_mean(x, MASK, -1)),
    "masked_sum": (VALUES, lambda x: masked_sum(x, MASK)),
    "pairwise_weights": (VALUES, lambda x: pairwise_weights(OLD, x, weighting="agreement", valid=MASK)),
    "policy_loss": (VALUES, loss),
    "policy_loss: rows": (VALUES, lambda x: loss(x, level="sequence", kl="k2", aggregation="sequence")),
    "sequence_scores": (VALUES, lambda x: sequence_scores(x, MASK)),
    "token sampler": (LOGITS, lambda x: sample(x, temperature=0.7)),
    "token sampler: greedy": (LOGITS, lambda x: sample(x, temperature=0.0, repetition_penalty=1.3)),
    "token sampler: filters": (LOGITS, lambda x: sample(x, top_k=7, top_p=0.9, min_p=0.01)),
    "inverse_cdf": (LOGITS, lambda x: inverse_cdf(x.softmax(-1), torch.linspace(0.05, 1, N))),
}
OF_TEXTS = {"reasoning_trace", "semantic_density", "tokenize"}


def test_no_public_function_is_missing() -> None:
    public = {name for name in functional.__all__ if name[0].islower()}
    assert public - OF_TEXTS <= {name.partition(":")[0] for name in CASES}


WITH_GRADIENT = {
    "chunked_logprobs",
    "embedding_density",
    "logprobs_from_logits",
    "masked_mean",
    "masked_sum",
    "policy_loss",
}


def run(name: str, dtype: torch.dtype, autocast: torch.dtype | None) -> Values:
    """What a function returns, and the gradient of a weighted sum of it."""
    values, function = CASES[name]
    values = values.to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        found = function(values)
        found = dict(found) if isinstance(found, dict) else {"value": found}
        total = torch.zeros((), dtype=torch.float64)
        for value in found.values():
            if value.requires_grad:
                weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view_as(value)
                total = total + (value.double() * weights).sum()
        # Lightning's manual optimisation goes backward under autocast. Of these functions only the similarities have a
        # product in their backward pass, and nothing that is trained depends on them.
        with torch.autocast("cpu", enabled=autocast is not None and name != "embedding_density"):
            if total.requires_grad:
                (found["gradient"],) = torch.autograd.grad(total, values)
    return found


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_no_bit(name: str, dtype: torch.dtype, autocast: torch.dtype) -> None:
    expected, found = run(name, dtype, None), run(name, dtype, autocast)
    assert found.keys() == expected.keys()
    assert ("gradient" in found) == (name.partition(":")[0] in WITH_GRADIENT)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
        if value.is_floating_point() and key != "gradient":
            assert value.dtype in (torch.float32, torch.float64), key


@pytest.mark.parametrize("recompute", [True, False])
def test_the_head_is_the_only_product_that_autocast_rounds(recompute: bool) -> None:
    """Entropies by the formula, in float64, from the very logits that the head gives under autocast."""
    head = nn.Linear(V, 257, bias=False)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    head.requires_grad_(recompute)
    hidden = LOGITS.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(hidden)
        found, entropy = chunked_logprobs(hidden, TARGETS, head, entropy=True, recompute=recompute)
    assert logits.dtype == torch.bfloat16
    exact = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(found.double(), exact.gather(-1, TARGETS[:, None])[:, 0], atol=1e-5, rtol=0)
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "ones"), [(torch.bfloat16, 1001), (torch.float16, 70_000)])
def test_sums_of_half_types_are_float32(dtype: torch.dtype, ones: int) -> None:
    """1,001 is no bfloat16 number, and 70,000 is infinite in float16."""
    values, mask = torch.ones(1, ones, dtype=dtype), torch.ones(1, ones, dtype=torch.bool)
    assert masked_sum(values, mask).item() == ones
    assert masked_sum(values * 3, mask, -1).tolist() == [3 * ones]
    assert masked_mean(values, mask).item() == 1.0
    assert masked_mean(values, mask).dtype == torch.float32
