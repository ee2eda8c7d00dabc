"""Completion masks and masked reductions."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lambdapo.functional import completion_mask, masked_mean, masked_sum


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 6).flatmap(
        lambda width: st.lists(st.lists(st.integers(0, 4), min_size=width, max_size=width), min_size=1, max_size=4)
    ),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_completion_mask_equals_the_loop(rows: list[list[int]], eos_ids: list[int]) -> None:
    found = completion_mask(torch.tensor(rows, dtype=torch.long), eos_ids)
    assert found.dtype == torch.bool
    assert found.tolist() == [reference.completion_mask(row, eos_ids) for row in rows]


def test_completion_mask_by_hand() -> None:
    ids = torch.tensor([[5, 2, 2, 2], [2, 2, 2, 2], [5, 6, 7, 8], [9, 5, 2, 5], [5, 6, 7, 2]])
    # 2 ends and pads alike; the end itself counts, padding after it does not.
    assert completion_mask(ids, 2).sum(-1).tolist() == [2, 1, 4, 3, 4]
    assert completion_mask(ids, [2, 9]).sum(-1).tolist() == [2, 1, 4, 1, 4]
    assert completion_mask(ids, (7, 5)).sum(-1).tolist() == [1, 4, 1, 2, 1]


def test_completion_mask_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="`eos_ids` is empty"):
        completion_mask(torch.zeros(1, 1, dtype=torch.long), [])
    with pytest.raises(ValueError, match=r"`completion_ids` must have shape \(N, T\), got \(3,\)"):
        completion_mask(torch.zeros(3, dtype=torch.long), 0)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_reductions_keep_junk_out_of_value_and_gradient(junk: float) -> None:
    values = torch.tensor([[1.0, 2.0, junk], [4.0, junk, junk], [junk] * 3], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    assert masked_sum(values, mask).item() == 7.0
    assert masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert masked_sum(values, mask, -1).tolist() == [3.0, 4.0, 0.0]
    assert masked_sum(values, mask, 0).tolist() == [5.0, 2.0, 0.0]
    means = masked_mean(values, mask, -1)
    assert means.tolist() == [1.5, 4.0, 0.0]
    means.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0] * 3]
