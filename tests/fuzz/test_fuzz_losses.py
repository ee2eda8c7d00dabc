"""The loss and the log-probabilities over arbitrary numbers, shapes and settings."""

import math
from typing import Any, get_args

import pytest
import torch
from fuzz.fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lambdapo.functional import LossOutput, chunked_logprobs, logprobs_from_logits, policy_loss
from lightning_lambdapo.functional.losses import Aggregation, KLEstimator, Level

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
options_of_loss = st.fixed_dictionaries(
    {
        "clip_low": st.floats(0, 1),
        "clip_high": st.sampled_from([0.0, 0.28, math.inf]) | st.floats(0, 1e3),
        "level": st.sampled_from(get_args(Level)),
        "kl_coef": st.sampled_from([0.0, 0.04, 1.0]),
        "kl": st.sampled_from(get_args(KLEstimator)),
        "aggregation": st.sampled_from(get_args(Aggregation)),
        "max_new_tokens": st.integers(1, 50),
        "token_count": st.none() | st.integers(0, 50),
        "row_count": st.none() | st.integers(0, 50),
    }
)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """The tensors of a loss, up to three rows of up to four tokens."""
    rows, length, dtype = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.sampled_from(TYPES))

    def tensor(values: st.SearchStrategy[Any], *shape: int) -> Tensor:
        count = math.prod(shape)
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float64).view(shape)

    logprobs = st.floats(-40, 0) | st.sampled_from([0.0, -1.0])
    return {
        **{name: tensor(logprobs, rows, length).to(dtype) for name in ("logprobs", "old_logprobs", "ref_logprobs")},
        "advantages": tensor(st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1.0]), rows).to(dtype),
        "mask": tensor(st.booleans(), rows, length).bool(),
    }


def computed(batch: dict[str, Any], options: dict[str, Any]) -> tuple[LossOutput, Tensor]:
    """The loss, and its gradient by the log-probabilities."""
    logprobs = batch["logprobs"].clone().requires_grad_()
    output = policy_loss(**{**batch, "logprobs": logprobs}, **options)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output, gradient


@fuzz(200)
@given(batches(), options_of_loss)
def test_losses_and_gradients_are_finite(batch: dict[str, Any], options: dict[str, Any]) -> None:
    output, gradient = computed(batch, options)
    assert output.loss.shape == ()
    assert output.loss.isfinite()
    assert output.loss.dtype in {torch.float32, torch.float64}
    assert output.mean_kl is not None
    for value in (output.mean_kl, output.clip_fraction, output.ratio_max):
        assert value.shape == ()
        assert value.isfinite()
        assert not value.requires_grad
    assert 0 <= output.clip_fraction <= 1
    assert output.ratio_max >= 0
    assert output.mean_kl >= -1e-6 or options["kl"] == "k1"
    assert (gradient[~batch["mask"]] == 0).all()
    if not batch["mask"].any():
        assert output.loss == output.clip_fraction == output.ratio_max == 0


@fuzz(100)
@given(batches(), options_of_loss, st.sampled_from([90.0, 800.0, 6e4]))
def test_ratios_beyond_float_range_leave_losses_and_gradients_finite(
    batch: dict[str, Any], options: dict[str, Any], gap: float
) -> None:
    batch = batch | {"old_logprobs": batch["old_logprobs"] - gap, "ref_logprobs": None}
    output, gradient = computed(batch, options | {"kl_coef": 0.0})
    assert output.loss.isfinite()
    assert output.ratio_max.isfinite()
    assert gradient.isfinite().all() or gradient.dtype == torch.float16  # whose largest number is 65,504
    if options["clip_high"] < 1e3:
        assert (gradient[batch["advantages"] >= 0] == 0).all()


@fuzz(150)
@given(batches(), options_of_loss, st.sampled_from([math.nan, math.inf, -math.inf, 6e4, -6e4]))
def test_junk_in_masked_places_has_no_effect(batch: dict[str, Any], options: dict[str, Any], junk: float) -> None:
    mask = batch["mask"]
    changed = {
        name: values if name == "mask" else torch.where(mask if values.ndim == 2 else mask.any(-1), values, junk)
        for name, values in batch.items()
    }
    (before, gradient), (after, changed_gradient) = computed(batch, options), computed(changed, options)
    assert all(
        torch.equal(getattr(before, name), getattr(after, name))
        for name in ("loss", "mean_kl", "clip_fraction", "ratio_max")
    )
    assert torch.equal(gradient, changed_gradient)


@fuzz(100)
@given(batches(), options_of_loss, st.integers(0, 3))
def test_parts_add_up_to_the_step(batch: dict[str, Any], options: dict[str, Any], cut: int) -> None:
    batch = {name: values if name == "mask" else values.double() for name, values in batch.items()}
    counts = {"token_count": int(batch["mask"].sum()), "row_count": int(batch["mask"].any(-1).sum())}
    options = options | counts
    whole = policy_loss(**batch, **options).loss
    parts = [{name: values[part] for name, values in batch.items()} for part in (slice(cut), slice(cut, None))]
    total = torch.stack([policy_loss(**part, **options).loss for part in parts]).sum()
    torch.testing.assert_close(total, whole, atol=1e-9, rtol=1e-9)


@fuzz(200)
@given(
    st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 7)),
    st.sampled_from(TYPES),
    st.sampled_from([0.0, 1.0, 50.0, 1e4]),
    st.sampled_from([1, 1.0, 0.5, 7.5, 10**30]),
    st.integers(1, 6),
    st.integers(0, 10**6),
)
def test_chunks_are_the_whole_in_parts(
    sizes: tuple[int, int, int], dtype: torch.dtype, spread: float, temperature: float, chunk_size: int, seed: int
) -> None:
    (count, width, vocabulary), generator = sizes, torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator).to(dtype)
    weight = (torch.randn(width, vocabulary, generator=generator) * spread).clamp(-1e4, 1e4).to(dtype)
    targets = torch.randint(vocabulary, (count,), generator=generator)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    whole = logprobs_from_logits(hidden @ weight, targets, temperature=temperature)
    assert whole.dtype == wanted
    assert whole.isfinite().all()
    assert (whole <= 1e-6).all()
    gradients = []
    for recompute in (True, False):
        inputs = hidden.clone().requires_grad_()
        found, entropies = chunked_logprobs(
            inputs,
            targets,
            lambda part: part @ weight,
            temperature=temperature,
            chunk_size=chunk_size,
            entropy=True,
            recompute=recompute,
        )
        assert entropies is not None
        assert found.shape == entropies.shape == targets.shape
        assert found.dtype == entropies.dtype == wanted
        slack = 1e-6 * (1 + float((hidden @ weight).abs().max() if count else 0) / temperature)
        assert ((entropies >= -slack) & (entropies <= math.log(vocabulary) + slack)).all()
        coarse = dtype in {torch.float16, torch.bfloat16}  # products of other shapes round differently
        torch.testing.assert_close(found, whole, atol=max(slack, 0.02 * slack * 1e6 if coarse else 0), rtol=1e-5)
        gradients.append(torch.autograd.grad(found.sum(), inputs)[0])
        assert gradients[-1].isfinite().all()
    size = max(1.0, float(weight.abs().max()) / temperature)
    error = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-5) + slack  # large logits round their sum
    torch.testing.assert_close(gradients[0], gradients[1], atol=error * size, rtol=error)


@fuzz(60)
@given(st.lists(st.lists(st.just(-math.inf) | st.floats(-1e4, 1e4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_forbidden_tokens_leave_entropies_finite(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    logits[:, 1] = logits[:, 1].clamp(min=-1e4)
    targets = torch.ones(len(rows), dtype=torch.int64)
    for recompute in (True, False):
        found, entropies = chunked_logprobs(
            logits.clone().requires_grad_(), targets, lambda part: part * 1, entropy=True, recompute=recompute
        )
        assert entropies is not None
        expected = torch.distributions.Categorical(logits=logits.clamp(min=-1e30)).entropy()
        torch.testing.assert_close(entropies, expected, atol=1e-9, rtol=0)
        assert found.isfinite().all()


@pytest.mark.parametrize("temperature", [10**400, 0, -1, math.nan, math.inf])
def test_temperatures_that_no_float_holds_are_refused(temperature: Any) -> None:
    with pytest.raises(ValueError, match="`temperature` must be a finite number above 0"):
        logprobs_from_logits(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), temperature=temperature)
    with pytest.raises(ValueError, match="`temperature` must be a finite number above 0"):
        chunked_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.clone, temperature=temperature)
