"""The chunked head against plain autograd."""

import pytest
import torch
import torch.nn.functional as F

from bd3lm.model import HeadInputs, head_cross_entropy
from bd3lm.model import head as head_module
from bd3lm.model.cross_entropy import LossInputs, composed_cross_entropy_, cross_entropy_


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_loss_and_gradients_equal_autograd(bias, rows, monkeypatch):
    m, width, vocab, mask_id = 23, 8, 40, 5
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * vocab * rows)
    monkeypatch.setattr(head_module, "SLICE", 13)
    torch.manual_seed(0)
    features = torch.randn(m, width, requires_grad=True)
    weights = torch.randn(vocab, width, requires_grad=True)
    offset = torch.randn(vocab, requires_grad=True) if bias else None
    target = torch.randint(6, vocab, (m,))
    weight = torch.rand(m)
    inputs = [x for x in (features, weights, offset) if x is not None]

    logits = F.linear(features, weights, offset)
    logits = logits.index_fill(1, torch.tensor([mask_id]), -torch.inf)
    expected_nll = F.cross_entropy(logits, target, reduction="none")
    expected = (expected_nll * weight).sum()
    expected_grads = torch.autograd.grad(3 * expected, inputs)

    total, nll = head_cross_entropy(HeadInputs(features, weights, offset, target, weight, mask_id))
    grads = torch.autograd.grad(3 * total, inputs)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(nll, expected_nll)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert grads[1][mask_id].abs().max() == 0  # the mask token is not even a rival


def test_nothing_masked_is_zero():
    features, head = torch.zeros(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64)
    total, nll = head_cross_entropy(HeadInputs(features, head, None, target, torch.zeros(0), 8))
    total.backward()
    assert total.item() == 0
    assert nll.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kernel_equals_the_composed_operations(dtype, weighted):
    torch.manual_seed(0)
    logits = (torch.randn(37, 203) * 4).to(dtype)
    target = torch.randint(6, 203, (37,))
    weight = torch.rand(37) if weighted else None
    bias = torch.randn(203)
    ours, theirs = logits.clone(), logits.clone()
    d_ours, d_theirs = torch.ones(203), torch.ones(203)  # the kernels add to these
    nll = cross_entropy_(LossInputs(ours, bias, target, weight, 5, d_ours))
    expected = composed_cross_entropy_(LossInputs(theirs, bias, target, weight, 5, d_theirs))
    # The composed operations round the sum of logits and bias to their dtype.
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(nll, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(d_ours, d_theirs, rtol=tolerance, atol=tolerance)
    if weighted:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(ours, logits)


def test_scoring_forms_no_gradient():
    features, head = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    inputs = HeadInputs(features, head, None, torch.tensor([1, 2, 3]), torch.ones(3), 8)
    with torch.no_grad():
        total, nll = head_cross_entropy(inputs)
    assert not total.requires_grad
    torch.testing.assert_close(nll, head_cross_entropy(inputs)[1])
