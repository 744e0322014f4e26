"""Cross-entropy of logits and its gradient, computed in place."""

from __future__ import annotations

import torch
from torch import Tensor

from bd3lm import _core
from bd3lm.model.attention import triton
from bd3lm.model.fused import flat, row
from bd3lm.model.threads import kernel_threads


def cross_entropy_(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    mask_id: int,
    d_bias: Tensor | None,
) -> Tensor:
    """Compute −log p of the targets; the mask token has probability zero (docs/math.md §5).

    Overwrites the logits. On the CPU a Rust kernel processes one row at a time in the cache, on an
    NVIDIA GPU a Triton kernel does.

    Args:
        logits: [R, V], contiguous (on a GPU each row is enough); with ``weight``, replaced by
            weight·(softmax − one-hot).
        bias: [V], added to them first; or None.
        target: true ids, int64 [R], never ``mask_id``.
        weight: float32 [R], or None if no gradient is needed.
        mask_id: the id whose probability is zero.
        d_bias: float32 [V], to which the sum of the gradients over rows is added; or None.

    Returns:
        float32 [R], in nats.
    """
    if logits.is_cuda and triton.available() and logits.dtype in triton.DTYPES:
        if bias is not None:
            logits.add_(bias)
        nll = fused_cross_entropy(logits, target, weight, mask_id)
        if weight is not None and d_bias is not None:
            d_bias.add_(logits.sum(0, dtype=torch.float32))
        return nll
    if logits.device.type != "cpu" or logits.dtype not in (torch.float32, torch.bfloat16):
        return composed_cross_entropy_(logits, bias, target, weight, mask_id, d_bias)
    nll, total = torch.empty(logits.shape[0]), torch.empty(logits.shape[1])
    _core.cross_entropy(
        flat(logits),
        row(torch.zeros_like(total) if bias is None else bias),
        target.contiguous().numpy(),
        None if weight is None else weight.contiguous().numpy(),
        mask_id,
        nll.numpy(),
        total.numpy(),
        kernel_threads(),
    )
    if d_bias is not None:
        d_bias.add_(total)
    return nll


@torch.library.custom_op("bd3lm::cross_entropy", mutates_args={"logits"})
def fused_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, mask_id: int
) -> Tensor:
    """As :func:`bd3lm.model.cross_entropy_triton.run_cross_entropy`, traceable."""
    from bd3lm.model.cross_entropy_triton import run_cross_entropy

    return run_cross_entropy(logits, target, weight, mask_id)


@fused_cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, weight: Tensor | None, mask_id: int) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def composed_cross_entropy_(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    mask_id: int,
    d_bias: Tensor | None,
) -> Tensor:
    """Compose :func:`cross_entropy_` of PyTorch operations, on any device and in any dtype."""
    if bias is not None:
        logits.add_(bias)
    logits[:, mask_id] = -torch.inf
    goal = target[:, None]
    log_p = logits.float().log_softmax(dim=-1)
    nll = -log_p.gather(1, goal).squeeze(1)
    if weight is not None:
        error = log_p.exp_().mul_(weight[:, None])
        error.scatter_add_(1, goal, -weight[:, None])
        logits.copy_(error)
        if d_bias is not None:
            d_bias.add_(logits.sum(0, dtype=torch.float32))
    return nll
