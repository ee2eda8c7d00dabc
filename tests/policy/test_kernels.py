"""oneDNN's linear layers compute what torch's do."""

import copy

import pytest
import tiny
import torch
from gradients import logits_and_gradients
from torch import nn

from lightning_lambdapo.policy.kernels import OneDNNLinear
from lightning_lambdapo.policy.lora import fast_linears

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this build of torch has no oneDNN",
)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_onednn_linear_is_linear(bias: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    layer.weight.requires_grad_(not frozen)
    fast = copy.deepcopy(layer)
    fast_linears(nn.Sequential(fast), onednn=True)
    assert type(fast) is OneDNNLinear
    x = torch.randn(3, 7, 24, requires_grad=True)
    upstream = torch.randn(3, 7, 40)
    exact = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    wanted = [each for each in (x, layer.weight, layer.bias) if each is not None and each.requires_grad]
    expected = torch.autograd.grad((exact * upstream).sum(), wanted)
    out = fast(x)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    leaves = [each for each in (x, fast.weight, fast.bias) if each is not None and each.requires_grad]
    found = torch.autograd.grad((out * upstream).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(fast(x), out)
    assert fast(x[:0]).shape == (0, 7, 40)


@needs_onednn
def test_onednn_leaves_other_types_alone() -> None:
    layer = nn.Linear(8, 8).double()
    fast = copy.deepcopy(layer)
    fast_linears(nn.Sequential(fast), onednn=True)
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(fast(x), layer(x))
    single = nn.Linear(8, 8)
    fast_linears(nn.Sequential(single), onednn=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert single(x.float()).dtype == torch.bfloat16


@needs_onednn
def test_float32_gradient_with_everything_on() -> None:
    exact, wanted = logits_and_gradients(tiny.adapted(dtype=torch.float64).train())
    fast = tiny.adapted(dtype=torch.float32).train()
    fast_linears(fast, onednn=True)
    found, got = logits_and_gradients(fast)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)
    flat = torch.cat([gradient.flatten() for gradient in got.values()]).double()
    expected = torch.cat([wanted[name].flatten() for name in got])
    assert (flat - expected).norm() / expected.norm() < 1e-5
