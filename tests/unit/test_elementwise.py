"""GELU and dropout by the Rust kernels against PyTorch's own, and against themselves."""

import pytest
import torch
import torch.nn.functional as F

from bd3lm.model.elementwise import dropout_add, gelu


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 70, 129)])
def test_gelu_is_the_tanh_approximation(dtype, limit, shape):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype)
    d_out = torch.randn(shape).to(dtype)
    wide = x.double().requires_grad_()
    want = F.gelu(wide, approximate="tanh")
    (want_d,) = torch.autograd.grad(want, wide, d_out.double())
    ours = x.clone().requires_grad_()
    out = gelu(ours)
    (got_d,) = torch.autograd.grad(out, ours, d_out)
    assert out.dtype == got_d.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=0, atol=limit)
    torch.testing.assert_close(got_d.double(), want_d, rtol=0, atol=3 * limit)


def test_gelu_takes_any_strides():
    x = torch.randn(6, 8).T.requires_grad_()
    (grad,) = torch.autograd.grad(gelu(x).sum(), x)
    wide = x.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(F.gelu(wide, approximate="tanh").sum(), wide)
    torch.testing.assert_close(grad, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_add_keeps_scales_and_remembers(dtype):
    h, x = torch.randn(40, 50), torch.ones(40, 50, dtype=dtype).requires_grad_()
    h.requires_grad_()
    torch.manual_seed(3)
    out = dropout_add(h, x, 0.25)
    d_h, d_x = torch.autograd.grad(out.sum(), (h, x))
    added = (out - h).detach()
    kept = added > 0.5
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.04)
    torch.testing.assert_close(added, kept / 0.75, rtol=0, atol=1e-5)
    torch.testing.assert_close(d_x.float(), kept / 0.75, rtol=1e-2, atol=0)
    assert torch.equal(d_h, torch.ones_like(h))
    torch.manual_seed(3)
    assert torch.equal(dropout_add(h, x, 0.25), out)
    assert not torch.equal(dropout_add(h, x, 0.25), out)


def test_no_dropout_is_a_sum():
    h, x = torch.randn(4), torch.randn(4)
    assert torch.equal(dropout_add(h, x, 0.0), h + x)
