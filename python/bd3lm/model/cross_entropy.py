"""Cross-entropy of logits and its gradient, computed in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bd3lm import _core
from bd3lm.model.attention import triton
from bd3lm.model.fused import flat, row
from bd3lm.model.threads import kernel_threads


class LossInputs(NamedTuple):
    """Logits of R positions and the inputs of their loss."""

    logits: Tensor
    """[R, V], contiguous (on a GPU each row is enough); overwritten."""
    bias: Tensor | None
    """[V], added to the logits first; or None."""
    target: Tensor
    """True ids, int64 [R], never ``mask_id``."""
    weight: Tensor | None
    """float32 [R]; with it the logits become the gradient of Σ weight·loss. None: no gradient."""
    mask_id: int | None
    """Id of the mask token; None where it is not among these V."""
    d_bias: Tensor | None
    """float32 [V], to which the sum of the gradients over rows is added; or None."""


def cross_entropy_(inputs: LossInputs) -> Tensor:
    """Compute −log p of the targets; the mask token has probability zero (docs/math.md §5).

    Overwrites the logits: with a weight, by weight·(softmax − one-hot). On the CPU a Rust kernel
    processes one row at a time in the cache, on an NVIDIA GPU a Triton kernel does.

    Returns:
        float32 [R], in nats.
    """
    logits, bias, target, weight, mask_id, d_bias = inputs
    if logits.is_cuda and triton.available() and logits.dtype in triton.DTYPES:
        return triton_cross_entropy_(inputs)
    if logits.device.type != "cpu" or logits.dtype not in (torch.float32, torch.bfloat16):
        return composed_cross_entropy_(inputs)
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


def triton_cross_entropy_(inputs: LossInputs) -> Tensor:
    """Compute :func:`cross_entropy_` by the Triton kernel."""
    logits, bias, target, weight, mask_id, d_bias = inputs
    if bias is not None:
        logits.add_(bias)
    nll = fused_cross_entropy(logits, target, weight, mask_id)
    if weight is not None and d_bias is not None:
        d_bias.add_(logits.sum(0, dtype=torch.float32))
    return nll


@torch.library.custom_op("bd3lm::cross_entropy", mutates_args={"logits"})
def fused_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, mask_id: int | None
) -> Tensor:
    """Operator of :func:`bd3lm.model.cross_entropy_triton.run_cross_entropy`, for tracing."""
    from bd3lm.model.cross_entropy_triton import run_cross_entropy

    return run_cross_entropy(logits, target, weight, mask_id)


@fused_cross_entropy.register_fake
def _(logits: Tensor, *_inputs: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def composed_cross_entropy_(inputs: LossInputs) -> Tensor:
    """Compose :func:`cross_entropy_` of PyTorch operations, on any device and in any dtype."""
    logits, bias, target, weight, mask_id, d_bias = inputs
    if bias is not None:
        logits.add_(bias)
    if mask_id is not None:
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
