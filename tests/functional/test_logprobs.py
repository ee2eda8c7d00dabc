"""Chunked log-probabilities against the dense ones and the loop twin, forward and backward."""

import math
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from where import DEVICE

from lightning_lambdapo.functional import chunked_logprobs, logprobs_from_logits
from lightning_lambdapo.functional.logprobs import softmax_and_normaliser

M, H, V = 11, 6, 17


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(H, V, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(M, H, generator=generator).to(DEVICE, dtype).requires_grad_()
    return hidden, torch.randint(V, (M,), generator=generator).to(DEVICE), head


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 1024])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_gradient_formed_ahead_is_that_of_dense_logits(chunk_size: int, temperature: float, cap: float | None) -> None:
    hidden, targets, linear = problem()
    linear.requires_grad_(False)

    def head(part: Tensor) -> Tensor:
        logits: Tensor = linear(part) * 0.7
        return logits if cap is None else torch.tanh(logits / cap) * cap

    upstream = torch.linspace(-1, 2, M, dtype=torch.float64, device=DEVICE)
    dense = logprobs_from_logits(head(hidden), targets, temperature=temperature)
    (expected,) = torch.autograd.grad((dense * upstream).sum(), hidden)
    found, entropy = chunked_logprobs(
        hidden, targets, head, temperature=temperature, chunk_size=chunk_size, recompute=False, entropy=True
    )
    (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden)
    torch.testing.assert_close(found, dense, atol=1e-12, rtol=0.0)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0.0)
    assert entropy is not None
    assert not entropy.requires_grad
    rows = [reference.entropy(row, temperature) for row in head(hidden).tolist()]
    torch.testing.assert_close(entropy.cpu(), torch.tensor(rows, dtype=torch.float64), atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_formed_ahead_in_half_types(dtype: torch.dtype) -> None:
    hidden, targets, head = problem(dtype)
    head.requires_grad_(False)
    found, _ = chunked_logprobs(hidden, targets, head, recompute=False)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    logits = head.double()(exact)
    (expected,) = torch.autograd.grad(logprobs_from_logits(logits, targets).sum(), exact)
    assert found.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, atol=0.1, rtol=0.05)


def test_normaliser_is_exact_where_probabilities_vanish() -> None:
    logits = torch.tensor([[400.0, 0.0, -400.0], [-1e4, -1e4, -1e4 + 1]])
    probabilities, normaliser = softmax_and_normaliser(logits)
    torch.testing.assert_close(normaliser, logits.double().logsumexp(-1).float())
    torch.testing.assert_close(probabilities, logits.softmax(-1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 1024])
def test_chunked_equals_dense_and_loops(chunk_size: int, temperature: float) -> None:
    hidden, targets, head = problem()
    upstream = torch.linspace(-1, 2, M, dtype=torch.float64, device=DEVICE)
    leaves = [hidden, *head.parameters()]

    dense = logprobs_from_logits(head(hidden), targets, temperature=temperature)
    dense_gradients = torch.autograd.grad((dense * upstream).sum(), leaves)
    found, none = chunked_logprobs(hidden, targets, head, temperature=temperature, chunk_size=chunk_size)
    assert none is None
    gradients = torch.autograd.grad((found * upstream).sum(), leaves)

    rows = head(hidden).tolist()
    expected = [
        reference.log_softmax(row, temperature)[target] for row, target in zip(rows, targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(dense.cpu(), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(found, dense, atol=1e-12, rtol=0.0)
    for gradient, dense_gradient in zip(gradients, dense_gradients, strict=True):
        torch.testing.assert_close(gradient, dense_gradient, atol=1e-12, rtol=0.0)


def test_gradient_by_hand() -> None:
    # d logp / d logit = (1[v = target] - p_v) / temperature
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    logprobs, _ = chunked_logprobs(logits, torch.tensor([0]), lambda h: h * 2, temperature=2.0)
    assert logprobs.item() == pytest.approx(math.log(0.25))
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[pytest.approx(0.75), pytest.approx(-0.75)]]


@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_entropy_equals_the_loops_and_has_no_gradient(temperature: float, chunk_size: int) -> None:
    hidden, targets, head = problem()
    logprobs, entropy = chunked_logprobs(
        hidden, targets, head, temperature=temperature, chunk_size=chunk_size, entropy=True
    )
    assert entropy is not None
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    expected = [reference.entropy(row, temperature) for row in head(hidden).tolist()]
    torch.testing.assert_close(entropy.cpu(), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(logprobs, chunked_logprobs(hidden, targets, head, temperature=temperature)[0])


def test_impossible_tokens_are_no_nan() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [5.0, -math.inf, -math.inf]])
    logprobs, entropy = chunked_logprobs(logits, torch.tensor([2, 0]), lambda h: h, entropy=True)
    assert entropy is not None
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(2), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0]))


@pytest.mark.parametrize("entropy", [False, True])
def test_no_more_than_one_chunk_of_logits_is_kept(entropy: bool) -> None:
    hidden, targets, head = problem()
    widths: list[int] = []
    kept: list[Tensor] = []

    def counting_head(part: Tensor) -> Tensor:
        widths.append(len(part))
        logits: Tensor = head(part)
        return logits

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = chunked_logprobs(hidden, targets, counting_head, chunk_size=4, entropy=entropy)
    assert widths == [4, 4, 3]
    assert not [tensor.shape for tensor in kept if tensor.shape[-1:] == (V,)]  # nothing that grows with V waits
    logprobs.sum().backward()
    assert sorted(widths) == [3, 3, 4, 4, 4, 4]  # recomputed

    widths.clear()
    kept.clear()
    head.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = chunked_logprobs(hidden, targets, counting_head, chunk_size=4, entropy=entropy, recompute=False)
        logprobs.sum().backward()
    assert widths == [4, 4, 3]  # and not recomputed
    assert not [tensor.shape for tensor in kept if tensor.shape[-1:] == (V,) and tensor.shape != (H, V)]

    widths.clear()
    with torch.no_grad():
        chunked_logprobs(hidden, targets, counting_head, chunk_size=4)
    assert widths == [4, 4, 3]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_position_keeps_the_graph(entropy: bool, recompute: bool) -> None:
    hidden, _, head = problem()
    logprobs, entropies = chunked_logprobs(
        hidden[:0], torch.zeros(0, dtype=torch.long, device=DEVICE), head, entropy=entropy, recompute=recompute
    )
    assert logprobs.shape == (0,)
    assert (entropies is not None) == entropy
    assert entropies is None or entropies.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_raised_before_the_softmax(dtype: torch.dtype) -> None:
    hidden, targets, head = problem(dtype)
    found, entropy = chunked_logprobs(hidden, targets, head, temperature=0.7, entropy=True)
    assert entropy is not None
    assert found.dtype == entropy.dtype == torch.float32
    rows = head(hidden).double().tolist()
    expected = [reference.log_softmax(row, 0.7)[target] for row, target in zip(rows, targets.tolist(), strict=True)]
    torch.testing.assert_close(found.cpu(), torch.tensor(expected), atol=2e-5, rtol=0.0)
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype


def test_dense_takes_any_leading_shape() -> None:
    logits = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[0, 5, 16], [3, 3, 9]])
    found = logprobs_from_logits(logits, targets, temperature=0.7)
    for i in range(2):
        for j in range(3):
            expected = reference.log_softmax(logits[i, j].tolist(), 0.7)[int(targets[i, j])]
            assert found[i, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be a finite number above 0, got 0.0"),
        ({"temperature": math.nan}, "`temperature` must be a finite number above 0, got nan"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"targets": torch.zeros(M - 1, dtype=torch.long)}, r"got \(11, 6\) and \(10,\)"),
        ({"hidden": torch.zeros(1, M, H)}, r"`hidden` must have shape \(M, H\)"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    hidden, targets, head = problem()
    with pytest.raises(ValueError, match=message):
        chunked_logprobs(**{"hidden": hidden, "targets": targets, "head": head, **options})


def test_dense_refuses_unlike_shapes_and_bad_temperatures() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3,\)"):
        logprobs_from_logits(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="`temperature`"):
        logprobs_from_logits(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), temperature=-1.0)
