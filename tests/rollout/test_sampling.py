import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.rollout.sampling import TokenSampler, inverse_cdf

PROBABILITIES = [0.0, 0.1, 0.0, 0.6, 0.3, 0.0]


def draw(logits: Tensor, *, prompt: list[list[int]] | None = None, draws: int = 20_001, **settings: Any) -> Tensor:
    """Tokens drawn at evenly spaced uniforms: their frequencies are the drawing distribution to 1e-4."""
    rows = torch.arange(draws)
    uniforms = ((rows + 1) / draws).double()[:, None]
    ids = torch.tensor(prompt or [[0]]).expand(draws, -1)
    mask = ids >= 0
    sampler = TokenSampler(SamplingConfig(**settings), uniforms, ids.clamp(min=0), mask)
    return sampler(logits.expand(draws, -1), rows, 0)[0].bincount(minlength=logits.shape[-1]) / draws


def test_inversion_gives_the_distribution() -> None:
    torch.testing.assert_close(draw(torch.tensor(PROBABILITIES).log()), torch.tensor(PROBABILITIES), atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_zero_is_never_drawn(dtype: torch.dtype) -> None:
    probabilities = torch.tensor(PROBABILITIES, dtype=dtype).expand(4, -1)
    uniforms = torch.tensor([2.0**-53, 0.1, 1.0 - 2.0**-53, 1.0], dtype=torch.float64)
    assert inverse_cdf(probabilities, uniforms).tolist() == [1, 1, 4, 4]


def test_boundaries_belong_to_the_lower_token() -> None:
    probabilities = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).expand(4, -1)
    uniforms = torch.tensor([0.25, 0.2500001, 0.5, 0.5000001], dtype=torch.float64)
    assert inverse_cdf(probabilities, uniforms).tolist() == [0, 1, 1, 2]


def renormalised(keep: list[int], weights: list[float]) -> Tensor:
    kept = torch.tensor([weight if index in keep else 0.0 for index, weight in enumerate(weights)])
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("settings", "keep"),
    [
        ({"top_k": 2}, [0, 2]),
        ({"top_p": 0.6}, [0, 2]),  # 0.4 alone does not reach 0.6
        ({"top_p": 0.39}, [0]),
        ({"min_p": 0.5}, [0, 2]),  # 0.3 >= 0.5 * 0.4 > 0.15
        ({"top_k": 3, "min_p": 0.7}, [0, 2]),
    ],
)
def test_filters(settings: dict[str, Any], keep: list[int]) -> None:
    weights = [0.4, 0.1, 0.3, 0.15, 0.05]
    found = draw(torch.tensor(weights).log(), **settings)
    torch.testing.assert_close(found, renormalised(keep, weights), atol=2e-4, rtol=0)


def test_temperature_divides_logits() -> None:
    weights = torch.tensor([0.4, 0.1, 0.5])
    expected = weights.sqrt() / weights.sqrt().sum()
    torch.testing.assert_close(draw(weights.log(), temperature=2.0), expected, atol=2e-4, rtol=0)


def test_repetition_penalty_sees_prompt_and_completion_but_not_padding() -> None:
    logits = torch.tensor([2.0, 2.0, -1.0, 0.5])
    # -1 marks padding, whose id (clamped to 0) must not count as seen.
    found = draw(logits, prompt=[[-1, 1, 2]], repetition_penalty=2.0)
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0, -2.0, 0.5]).softmax(-1), atol=2e-4, rtol=0)
    greedy = SamplingConfig(temperature=0.0, repetition_penalty=3.0)
    sampler = TokenSampler(greedy, torch.ones(1, 2).double(), torch.tensor([[3]]), torch.tensor([[True]]))
    row = torch.tensor([0])
    assert sampler(logits[None], row, 0)[0].item() == 0
    assert sampler(logits[None], row, 1)[0].item() == 1  # token 0 was drawn, so it is penalised now


def test_logprobs_and_entropy_ignore_the_filters() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    sampler = TokenSampler(
        SamplingConfig(top_k=1), torch.full((1, 1), 0.9).double(), torch.tensor([[0]]), torch.tensor([[True]])
    )
    token, logprob, entropy = sampler(weights.log(), torch.tensor([0]), 0)
    assert token.item() == 0
    assert logprob.item() == pytest.approx(math.log(0.5))
    assert entropy.item() == pytest.approx(1.5 * math.log(2))


def test_greedy_takes_the_most_likely_and_logs_at_temperature_one() -> None:
    config = SamplingConfig(temperature=0.0)
    sampler = TokenSampler(config, torch.full((1, 1), 0.01).double(), torch.tensor([[0]]), torch.tensor([[True]]))
    token, logprob, _ = sampler(torch.tensor([[0.2, 0.8]]).log(), torch.tensor([0]), 0)
    assert token.item() == 1
    assert logprob.item() == pytest.approx(math.log(0.8))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_bad_sampling_settings(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"`sampling.{name}` must be .*got {value}"):
        SamplingConfig(**{name: value})  # type: ignore[arg-type]
