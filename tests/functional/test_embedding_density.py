"""Greedy matching of token embeddings, against loops and numbers worked by hand."""

import math
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lambdapo.functional import embedding_density

ON, OFF = True, False


def rows(
    count: int, *, seed: int, longest: int = 5, size: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random embeddings under masks with holes, and at least one row in which nothing counts."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, longest, generator=generator) < 0.6
    mask[seed % count] = False
    return torch.randn(count, longest, size, generator=generator, dtype=torch.float64).to(dtype), mask


def test_by_hand() -> None:
    # Cosines of (3, 4) and (-1, 0) with (1, 0), (0, 2), (-2, 0): .6 .8 -.6 and -1 0 1.
    generated = torch.tensor([[[3.0, 4.0], [-1.0, 0.0]]])
    solution = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-2.0, 0.0]]])
    found = embedding_density(generated, torch.tensor([[ON, ON]]), solution, torch.tensor([[ON, ON, ON]]))
    precision, recall = (0.8 + 1) / 2, (0.6 + 0.8 + 1) / 3
    assert found.precision.item() == pytest.approx(precision)
    assert found.recall.item() == pytest.approx(recall)
    assert found.f.item() == pytest.approx(2 * precision * recall / (precision + recall))
    found = embedding_density(
        generated, torch.tensor([[ON, OFF]]), solution, torch.tensor([[ON, OFF, ON]]), beta=2.0
    )  # .6 and -.6, which counts as 0
    assert found.precision.item() == pytest.approx(0.6)
    assert found.recall.item() == pytest.approx(0.3)
    assert found.f.item() == pytest.approx(5 * 0.6 * 0.3 / (4 * 0.6 + 0.3))


def test_a_token_that_is_not_a_number_gives_no_number() -> None:
    """Not an F of 0, which would be taken for a reward."""
    broken, one = torch.tensor([[[math.nan, 1.0]]]), torch.ones(1, 1, 2)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for sides in ((broken, one), (one, broken)):
        assert all(value.isnan().all() for value in embedding_density(sides[0], mask, sides[1], mask))


def test_opposites_are_0_not_negative() -> None:
    one = torch.tensor([[[1.0, 2.0]]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert [value.tolist() for value in embedding_density(one, mask, -one, mask)] == [[0.0]] * 3


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.5, 1.0, 3.0]))
def test_equals_the_loops(seed: int, longest: int, size: int, beta: float) -> None:
    ours, ours_mask = rows(4, seed=seed, longest=longest, size=size)
    theirs, theirs_mask = rows(4, seed=seed + 1, longest=longest + 2, size=size)
    found = embedding_density(ours, ours_mask, theirs, theirs_mask, beta=beta)
    for row in range(4):
        expected = reference.embedding_density(
            ours[row].tolist(),
            ours_mask[row].tolist(),
            theirs[row].tolist(),
            theirs_mask[row].tolist(),
            beta=beta,
        )
        assert [value[row].item() for value in found] == pytest.approx(expected, abs=1e-12)
    assert all(value.dtype == torch.float64 for value in found)


def test_what_is_masked_out_has_no_effect() -> None:
    ours, ours_mask = rows(6, seed=0)
    theirs, theirs_mask = rows(6, seed=1)
    expected = embedding_density(ours, ours_mask, theirs, theirs_mask)
    for junk in (math.nan, math.inf, 1e300, 0.0):
        spoiled = [torch.where(m.unsqueeze(-1), e, junk) for e, m in ((ours, ours_mask), (theirs, theirs_mask))]
        found = embedding_density(spoiled[0], ours_mask, spoiled[1], theirs_mask)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    wider = torch.nn.functional.pad(ours, (0, 0, 0, 3), value=math.nan)
    found = embedding_density(wider, torch.nn.functional.pad(ours_mask, (0, 3)), theirs, theirs_mask)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


def test_swapped_sides_swap_precision_and_recall() -> None:
    ours, ours_mask = rows(5, seed=2)
    theirs, theirs_mask = rows(5, seed=3)
    forth = embedding_density(ours, ours_mask, theirs, theirs_mask, beta=2.0)
    back = embedding_density(theirs, theirs_mask, ours, ours_mask, beta=0.5)
    assert not torch.allclose(forth.precision, forth.recall)
    torch.testing.assert_close(forth.precision, back.recall)
    torch.testing.assert_close(forth.recall, back.precision)
    torch.testing.assert_close(forth.f, back.f)


def test_empty_sides_are_0() -> None:
    for first, second in ((2, 0), (0, 2), (0, 0)):
        found = embedding_density(
            torch.ones(3, first, 4),
            torch.ones(3, first, dtype=torch.bool),
            torch.ones(3, second, 4),
            torch.ones(3, second, dtype=torch.bool),
        )
        assert [value.tolist() for value in found] == [[0.0] * 3] * 3
    assert all(
        len(value) == 0
        for value in embedding_density(
            torch.ones(0, 2, 4), torch.ones(0, 2) > 0, torch.ones(0, 3, 4), torch.ones(0, 3) > 0
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    ours, ours_mask = rows(6, seed=4, dtype=dtype)
    theirs, theirs_mask = rows(6, seed=5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding_density(ours, ours_mask, theirs, theirs_mask)
    exact = embedding_density(ours.double(), ours_mask, theirs.double(), theirs_mask)
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30, 3e38])
@pytest.mark.parametrize("beta", [5e-324, 1e-200, 1.0, 1e200, 1.7e308])
def test_any_size_of_embeddings_and_any_beta(scale: float, beta: float) -> None:
    ours, ours_mask = rows(6, seed=6, dtype=torch.float32)
    theirs, theirs_mask = rows(6, seed=7, dtype=torch.float32)
    ours, theirs = ours / ours.abs().max(), theirs / theirs.abs().max()
    ours[0, 0] = 0.0
    found = embedding_density(ours * scale, ours_mask, theirs, theirs_mask, beta=beta)
    expected = embedding_density(ours, ours_mask, theirs, theirs_mask, beta=beta)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
        assert value.min() >= 0
        assert value.max() <= 1
    limit = {5e-324: expected.precision, 1e-200: expected.precision, 1e200: expected.recall, 1.7e308: expected.recall}
    torch.testing.assert_close(expected.f, limit.get(beta, expected.f))


def test_the_same_text_is_1() -> None:
    ours, mask = rows(8, seed=8, dtype=torch.float32)
    for value in embedding_density(ours, mask, ours * 7, mask):
        torch.testing.assert_close(value, mask.any(1).float())
        assert value.max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "`beta` must be a finite number above 0, got 0.0"),
        ({"generated": torch.ones(2, 4)}, r"shapes \(N, S, D\).*got \(2, 4\)"),
        ({"reference": torch.ones(2, 5, 7)}, r"\(2, 5, 7\)"),
        ({"reference": torch.ones(3, 5, 4)}, r"\(3, 5, 4\)"),
        ({"generated_mask": torch.ones(2, 5) > 0}, r"\(2, 5\)"),
        ({"reference_mask": torch.ones(2, 3) > 0}, r"\(2, 3\)"),
        ({"generated_mask": torch.ones(2, 3)}, r"must be bool, got torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    fitting: dict[str, Any] = {
        "generated": torch.ones(2, 3, 4),
        "generated_mask": torch.ones(2, 3) > 0,
        "reference": torch.ones(2, 5, 4),
        "reference_mask": torch.ones(2, 5) > 0,
    }
    with pytest.raises(ValueError, match=message):
        embedding_density(**(fitting | change))
