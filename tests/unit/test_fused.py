"""Fused operations: the Rust kernels against PyTorch's own operations in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bd3lm.model.fused import (
    activated,
    activated_linear,
    add_to,
    dropout_add,
    normalised,
    projected_heads,
    rotate,
)
from bd3lm.model.rotary import Rotary

DTYPES = [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)]


def exact_activation(x, kind):
    return F.gelu(x, approximate="tanh") if kind == "gelu" else x.clamp_min(0) ** 2


def exact_rotation(x, rope):
    cos, sin = (table[:, None] for table in rope)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([high, low], dim=-1) * sin


def check(ours, exact, inputs, limit, seed=1):
    """Values and gradients of two functions, the second in float64, relative to their size."""
    results = []
    for function, dtype in ((ours, None), (exact, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        outs = function(*leaves)
        torch.manual_seed(seed)
        upstream = [torch.randn(out.shape).to(out.dtype) for out in outs]
        results.append([*outs, *torch.autograd.grad(outs, leaves, upstream)])
    for got, want in zip(*results, strict=True):
        size = max(want.abs().max().item(), 0.01)  # sums that cancel are as large
        assert_close(got.double(), want, rtol=0, atol=limit * size)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("kind", ["gelu", "relu2"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 70, 129)])
def test_the_product_after_an_activation(dtype, limit, kind, shape):
    torch.manual_seed(0)
    x, bias = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    weight = torch.randn(7, shape[-1]).to(dtype)
    check(
        lambda x, bias, weight: [activated_linear(x, bias, weight, kind)],
        lambda x, bias, weight: [exact_activation(x + bias, kind) @ weight.T],
        (x, bias, weight),
        limit,
    )


@pytest.mark.parametrize("kind", ["gelu", "relu2"])
@pytest.mark.parametrize("learns", [False, True])
def test_an_activation_alone(kind, learns):
    x, bias = (3 * torch.randn(8, 6)).T, torch.randn(8)  # rows are not neighbours
    with torch.set_grad_enabled(learns):
        out = activated(x, bias, kind)
    want = exact_activation((x + bias).double(), kind)
    assert_close(out.double(), want, rtol=2e-6, atol=2e-6)


def test_autocast_decides_what_a_product_is_computed_in():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert activated_linear(x, None, weight, "gelu").dtype == torch.bfloat16
        assert normalised(x, torch.ones(8), None, "layernorm", 1e-5)[1].dtype == torch.bfloat16
    assert normalised(x, torch.ones(8), None, "layernorm", 1e-5)[1].dtype == torch.float32


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 70, 129)])
def test_norms_and_what_goes_on_beside_them(kind, shape):
    torch.manual_seed(0)
    inputs = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])

    def exact(x, weight, bias):
        mean = x.mean(-1, keepdim=True) if kind == "layernorm" else 0
        scale = ((x - mean).square().mean(-1, keepdim=True) + 1e-2).rsqrt()
        return x, (x - mean) * scale * weight + bias

    def ours(x, weight, bias):
        return normalised(x, weight, bias, kind, 1e-2)

    check(ours, exact, inputs, 5e-6)
    check(lambda *x: ours(*x)[1:], lambda *x: exact(*x)[1:], inputs, 5e-6)  # nothing else


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("head", [4, 32])
def test_projected_heads(dtype, limit, head):
    torch.manual_seed(0)
    widths, turned = [3 * head, head, head], [True, True, False]
    x, weight = torch.randn(2, 9, 11).to(dtype), torch.randn(5 * head, 11).to(dtype)
    rope = Rotary(head, 100.0).table(9, x.device)

    def exact(x, weight):
        parts = [p.unflatten(-1, (-1, head)) for p in (x @ weight.T).split(widths, dim=-1)]
        return [exact_rotation(p, rope) if t else p for p, t in zip(parts, turned, strict=True)]

    check(
        lambda x, weight: projected_heads(x, weight, widths, turned, rope, head),
        exact,
        (x, weight),
        limit,
    )


def test_a_part_that_nobody_uses_has_no_gradient():
    x, weight = torch.randn(1, 3, 4), torch.randn(12, 4, requires_grad=True)
    rope = Rotary(4, 100.0).table(3, x.device)
    q, _, v = projected_heads(x, weight, [4, 4, 4], [True, True, False], rope, 4)
    (q.sum() + v.sum()).backward()
    assert weight.grad[4:8].eq(0).all()
    assert_close(weight.grad[8:], x.sum((0, 1)).expand(4, 4))


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
def test_rotations(dtype, limit):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8).to(dtype)
    rope = Rotary(8, 100.0).table(5, x.device)
    check(lambda x: [rotate(x, rope)], lambda x: [exact_rotation(x, rope)], [x], limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_add_keeps_scales_and_remembers(dtype):
    h, x = torch.randn(40, 50), torch.full((40, 50), 0.5, dtype=dtype)
    bias = torch.full((50,), 0.5)
    leaves = [t.requires_grad_() for t in (h, x, bias)]
    torch.manual_seed(3)
    out = dropout_add(h, x, bias, 0.25)
    d_h, d_x, d_bias = torch.autograd.grad(out.sum(), leaves)
    added = (out - h).detach()
    kept = added > 0.5
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.04)
    assert_close(added, kept / 0.75, rtol=0, atol=1e-5)
    assert_close(d_x.float(), kept / 0.75, rtol=1e-2, atol=0)
    assert_close(d_bias, kept.sum(0) / 0.75)
    assert torch.equal(d_h, torch.ones_like(h))
    torch.manual_seed(3)
    assert torch.equal(dropout_add(h, x, bias, 0.25), out)
    assert not torch.equal(dropout_add(h, x, bias, 0.25), out)


def test_no_dropout_is_a_sum_and_draws_nothing():
    h, x, bias = torch.randn(4, 3), torch.randn(4, 3), torch.randn(3)
    state = torch.get_rng_state()
    assert torch.equal(dropout_add(h, x, bias, 0.0), h + (x + bias))
    assert torch.equal(dropout_add(h, x, None, 0.0), h + x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_is_put_and_the_others_are_added(dtype):
    x, total = torch.randn(5, 7).to(dtype), torch.full((5, 7), torch.nan)
    add_to(total, x, first=True)
    assert torch.equal(total, x.float())
    add_to(total, x, first=False)
    assert torch.equal(total, 2 * x.float())
