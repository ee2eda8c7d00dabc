"""The policy loss: golden file, the loop twin, aggregation over parts of a step, junk, edges."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from lightning_lambdapo.functional import LossOutput, policy_loss

GOLDEN = Path(__file__).parents[1] / "golden"
AGGREGATIONS = ["token", "sequence", "constant"]
NAMES = ("logprobs", "old_logprobs", "ref_logprobs", "advantages")
VARIANTS = [
    {"level": level, "kl_coef": kl_coef, "kl": kl, "aggregation": aggregation, "max_new_tokens": 9}
    for level, (kl_coef, kl), aggregation in itertools.product(
        ("token", "sequence"), ((0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")), AGGREGATIONS
    )
]


def batch(rows: int = 8, width: int = 7, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Ragged rows; one is empty (invalid), one has no advantage."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, width, generator=generator, dtype=torch.float64) * 3
    old, ref = (logprobs + 0.5 * torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    advantages[1] = 0.0
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    lengths[0], lengths[2], lengths[3] = width, 0, 1
    tensors = (tensor.to(dtype) for tensor in (logprobs, old, ref, advantages))
    return {**dict(zip(NAMES, tensors, strict=True)), "mask": torch.arange(width) < lengths}


def loss_and_gradient(tensors: dict[str, Any], **options: Any) -> tuple[LossOutput, Tensor]:
    leaf = tensors["logprobs"].clone().requires_grad_()
    output = policy_loss(**{**tensors, "logprobs": leaf}, **options)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, gradient


def twin(tensors: dict[str, Any], **options: Any) -> dict[str, float]:
    defaults: dict[str, Any] = {
        "clip_low": 0.2, "clip_high": 0.2, "level": "token", "kl_coef": 0.0, "kl": "k3", "aggregation": "token",
        "max_new_tokens": 9,
    }  # fmt: skip
    lists: dict[str, Any] = {name: tensor.tolist() for name, tensor in tensors.items()}
    return reference.policy_loss(**lists, **defaults | options)


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_policy_loss_golden(dtype: torch.dtype, tolerance: float) -> None:
    rows = json.loads((GOLDEN / "losses.json").read_text())
    assert len(rows) == 18
    for row in rows:
        expected = {name: row.pop(name) for name in ("loss", "mean_kl", "clip_fraction")}
        tensors: dict[str, Any] = {name: torch.tensor(row.pop(name), dtype=dtype) for name in NAMES}
        output = policy_loss(**tensors, mask=torch.tensor(row.pop("mask")), **row)
        assert output.loss.dtype == dtype
        for name, value in expected.items():
            assert getattr(output, name).item() == pytest.approx(value, abs=tolerance), name


@pytest.mark.parametrize("options", VARIANTS)
def test_policy_loss_equals_the_loops(options: dict[str, Any]) -> None:
    clipped = 0.0
    for seed in range(5):
        tensors = batch(seed=seed)
        expected = twin(tensors, clip_low=0.15, clip_high=0.28, **options)
        output = policy_loss(**tensors, clip_low=0.15, clip_high=0.28, **options)
        for name, value in expected.items():
            assert getattr(output, name).item() == pytest.approx(value, abs=1e-12), name
        assert expected["ratio_max"] > 1
        clipped += expected["clip_fraction"]
    assert 0 < clipped < 5


def test_defaults_are_those_of_the_documentation() -> None:
    tensors = batch()
    expected = twin(tensors)
    output = policy_loss(**tensors)
    assert output.loss.item() == pytest.approx(expected["loss"], abs=1e-12)
    assert output.mean_kl is not None  # logged though its coefficient is 0
    assert output.mean_kl.item() == pytest.approx(expected["mean_kl"], abs=1e-12)


def test_without_reference_there_is_no_kl() -> None:
    tensors = batch() | {"ref_logprobs": None}
    output = policy_loss(**tensors)
    assert output.mean_kl is None
    assert output.loss.item() == policy_loss(**batch()).loss.item()


def test_statistics_carry_no_gradient() -> None:
    tensors = batch()
    output = policy_loss(**tensors | {"logprobs": tensors["logprobs"].requires_grad_()}, kl_coef=0.1)
    assert output.loss.requires_grad
    assert not any(x.requires_grad for x in (output.mean_kl, output.clip_fraction, output.ratio_max) if x is not None)


def test_largest_ratio_is_that_of_a_token_that_counts() -> None:
    logprobs, mask = torch.tensor([[-2.0, -1.5, 0.0]]), torch.tensor([[True, True, False]])
    output = policy_loss(logprobs, torch.full((1, 3), -1.0), None, torch.ones(1), mask)
    assert output.ratio_max.item() == pytest.approx(math.exp(-0.5))  # not the 1 of a place that is masked out


def test_clipping_binds_strictly() -> None:
    # On-policy the ratio is exactly 1: nothing binds, not even with a clip range of no width.
    tensors = batch()
    tensors["old_logprobs"] = tensors["logprobs"]
    output = policy_loss(**tensors, clip_low=0.0, clip_high=0.0)
    assert output.clip_fraction.item() == 0.0
    assert output.ratio_max.item() == 1.0


# -- one step, however it is split ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", VARIANTS)
def test_parts_of_a_step_add_up_to_the_step(options: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = batch(dtype=dtype)
    whole, gradient = loss_and_gradient(tensors, **options)
    counts = {"token_count": int(tensors["mask"].sum()), "row_count": int(tensors["mask"].any(-1).sum())}
    for parts in ([[5, 0], [1, 2, 3], [4, 6, 7]], [[row] for row in range(8)], [[2], [7, 6, 5, 4, 3, 1, 0]]):
        loss, pieces = 0.0, torch.zeros_like(gradient)
        for rows in parts:
            part = {name: tensor[rows] for name, tensor in tensors.items()}
            width = max(int(part["mask"].sum(-1).max()), 1)  # trimmed, as a micro-batch is
            part = {name: tensor[:, :width] if tensor.ndim == 2 else tensor for name, tensor in part.items()}
            output, piece = loss_and_gradient(part, **options, **counts)
            loss += output.loss.item()
            pieces[rows, :width] += piece
        assert loss == pytest.approx(whole.loss.item(), abs=1e-6)
        torch.testing.assert_close(pieces, gradient, atol=1e-12 if dtype == torch.float64 else 1e-6, rtol=0.0)


@pytest.mark.parametrize("options", VARIANTS)
def test_padding_changes_nothing(options: dict[str, Any]) -> None:
    tensors = batch()
    output, gradient = loss_and_gradient(tensors, **options)
    padded = {
        name: torch.nn.functional.pad(tensor, (0, 5)) if tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    padded_output, padded_gradient = loss_and_gradient(padded, **options)
    assert padded_output.loss.item() == pytest.approx(output.loss.item(), abs=1e-12)
    torch.testing.assert_close(padded_gradient[:, :7], gradient)


def test_empty_rows_are_not_in_the_denominator() -> None:
    tensors = batch()
    kept = [0, 1, 3, 4, 5, 6, 7]
    for aggregation in AGGREGATIONS:
        options: Any = {"aggregation": aggregation, "max_new_tokens": 9, "kl_coef": 0.2}
        full = policy_loss(**tensors, **options).loss
        without = policy_loss(**{name: tensor[kept] for name, tensor in tensors.items()}, **options).loss
        assert full.item() == pytest.approx(without.item(), abs=1e-12)


def test_the_denominators_by_hand() -> None:
    ones = torch.zeros(3, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    advantages = torch.tensor([1.0, 2.0, 5.0])
    expected = {"token": -(3 + 2) / 4, "sequence": -(1 + 2) / 2, "constant": -(3 + 2) / (2 * 10)}
    for aggregation, value in expected.items():
        output = policy_loss(ones, ones, None, advantages, mask, aggregation=aggregation, max_new_tokens=10)  # type: ignore[arg-type]
        assert output.loss.item() == pytest.approx(value)


# -- junk and edges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("options", VARIANTS)
def test_junk_in_masked_places_changes_neither_loss_nor_gradient(options: dict[str, Any], junk: float) -> None:
    tensors = batch()
    output, gradient = loss_and_gradient(tensors, **options)
    dirty = {
        name: tensor.masked_fill(~tensors["mask"], junk) if name.endswith("logprobs") else tensor
        for name, tensor in tensors.items()
    }
    dirty["advantages"] = dirty["advantages"].masked_fill(~tensors["mask"].any(-1), junk)
    dirty_output, dirty_gradient = loss_and_gradient(dirty, **options)
    assert torch.equal(dirty_gradient, gradient)
    for name in ("loss", "mean_kl", "clip_fraction", "ratio_max"):
        assert torch.equal(getattr(dirty_output, name), getattr(output, name)), name


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("counts", [{}, {"token_count": 0, "row_count": 0}])
def test_no_masked_token_gives_a_zero_with_a_graph(shape: tuple[int, int], aggregation: Any, counts: Any) -> None:
    logprobs = torch.full(shape, math.nan, requires_grad=True)
    output = policy_loss(
        logprobs,
        logprobs.detach(),
        logprobs.detach(),
        torch.ones(shape[0]),
        torch.zeros(shape, dtype=torch.bool),
        aggregation=aggregation,
        max_new_tokens=4,
        kl_coef=0.1,
        **counts,
    )
    assert output.loss.item() == 0.0
    output.loss.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad == 0).all()
    assert output.mean_kl is not None
    assert [output.mean_kl.item(), output.clip_fraction.item(), output.ratio_max.item()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_raised_first(dtype: torch.dtype) -> None:
    tensors = batch(dtype=dtype)
    raised = {name: tensor if name == "mask" else tensor.float() for name, tensor in tensors.items()}
    output = policy_loss(**tensors, kl_coef=0.1, level="sequence")
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, policy_loss(**raised, kl_coef=0.1, level="sequence").loss)


def test_one_float64_input_is_enough_for_float64() -> None:
    tensors = batch(dtype=torch.float32)
    for name in NAMES:
        assert policy_loss(**tensors | {name: tensors[name].double()}, kl_coef=0.1).loss.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "row"}, "`level` must be one of token, sequence, got 'row'"),
        ({"kl": "k4"}, "`kl` must be one of k1, k2, k3, got 'k4'"),
        ({"aggregation": "mean"}, "`aggregation` must be one of token, sequence, constant, got 'mean'"),
        ({"aggregation": "constant"}, "`max_new_tokens` must be at least 1"),
        ({"aggregation": "constant", "max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"kl_coef": 0.1, "ref_logprobs": None}, "`kl_coef` is 0.1 and `ref_logprobs` is None"),
        ({"clip_low": 1.5}, r"`clip_low` must be in \[0, 1\]"),
        ({"clip_high": -0.1}, "`clip_high` at least 0"),
        ({"advantages": torch.zeros(8, 7)}, r"`advantages` \(N,\), got \(8, 7\) and \(8, 7\)"),
        ({"old_logprobs": torch.zeros(8, 6)}, "Shapes must agree"),
        ({"ref_logprobs": torch.zeros(8, 1)}, "Shapes must agree"),
        ({"mask": torch.ones(7)}, "Shapes must agree"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**batch(), **options})
