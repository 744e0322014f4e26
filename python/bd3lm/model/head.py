"""Output head and cross-entropy in one pass over chunks: logits of all positions never exist."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bd3lm.model.softmax import cross_entropy_

CHUNK_BYTES = 16 << 20
"""Size of the logits of one chunk: large enough for the matrix product, near the caches."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ weight·CE with its gradients formed chunk by chunk in the forward pass.

    The loss is linear in the incoming gradient (a scalar), so the backward pass only scales what
    the forward pass left. Peak memory is one chunk of logits and the gradients themselves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        head: Tensor,
        bias: Tensor | None,
        target: Tensor,
        weight: Tensor,
        mask_id: int,
    ) -> tuple[Tensor, Tensor]:
        grads = _Gradients(
            torch.empty_like(features),
            torch.zeros_like(head),
            None if bias is None else torch.zeros_like(bias),
        )
        nll = _in_chunks(features, head, bias, target, weight, mask_id, grads)
        ctx.save_for_backward(*(g for g in grads if g is not None))
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(nll)
        return (nll * weight).sum(), nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = [grad * upstream[0] for grad in ctx.saved_tensors]
        return saved[0], saved[1], saved[2] if ctx.has_bias else None, None, None, None


class _Gradients(NamedTuple):
    """Of Σ weight·CE, filled on the way."""

    features: Tensor
    head: Tensor
    bias: Tensor | None


def _in_chunks(
    features: Tensor,
    head: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor,
    mask_id: int,
    grads: _Gradients | None,
) -> Tensor:
    """CE of each position, float32 [M]; fills ``grads`` where they are wanted."""
    dtype = _compute_dtype(features)
    matrix = head.to(dtype)
    rows = max(1, CHUNK_BYTES // (dtype.itemsize * head.shape[0]))
    nll = torch.empty(features.shape[0], dtype=torch.float32, device=features.device)
    for start in range(0, features.shape[0], rows):
        part = slice(start, start + rows)
        x = features[part].to(dtype)
        logits = x @ matrix.T
        if bias is not None:
            logits += bias
        if grads is None:
            nll[part] = cross_entropy_(logits, target[part], None, mask_id)
            continue
        nll[part] = cross_entropy_(logits, target[part], weight[part].float(), mask_id)
        # The logits have become their own gradient.
        grads.features[part] = (logits @ matrix).to(features.dtype)
        grads.head.add_(logits.T @ x)
        if grads.bias is not None:
            grads.bias.add_(logits.sum(0, dtype=torch.float32))
    return nll


def _compute_dtype(features: Tensor) -> torch.dtype:
    kind = features.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype


def head_cross_entropy(
    features: Tensor,
    head: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of the head at M positions, with the mask token excluded (MATH §5).

    Args:
        features: normalised features [M, D].
        head: output matrix [V, D].
        bias: output bias [V], or None.
        target: true ids, int64 [M], never ``mask_id``.
        weight: loss weight of each position, float32 [M].
        mask_id: the id whose probability is zero.

    Returns:
        ``(sum, nll)``: Σ weight·CE in nats, differentiable; and the unweighted CE of each
        position, float32 [M], not differentiable. Logits are formed in the autocast dtype where
        autocast is on, in the features' dtype otherwise; the softmax is float32.
    """
    learns = any(x is not None and x.requires_grad for x in (features, head, bias))
    if torch.is_grad_enabled() and learns:
        return _ChunkedCrossEntropy.apply(features, head, bias, target, weight, mask_id)
    nll = _in_chunks(features, head, bias, target, weight, mask_id, None)
    return (nll * weight).sum(), nll
