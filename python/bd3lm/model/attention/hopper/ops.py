"""The Hopper kernels as PyTorch operators, as those of ``triton/ops.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from bd3lm.model.attention.triton.ops import (
    fake_backward,
    fake_forward,
    gradients_by,
    save_for_gradients,
)


@torch.library.custom_op("bd3lm::hopper_attention", mutates_args=())
def hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: Tensor,
    query_ranges: Tensor,
    query_work: Tensor,
    key_work: Tensor,
    noised: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention under a mask of ranges (docs/math.md §7).

    Args:
        q: fp16 or bf16 [B, H, Tq, D], D of 64 or 128.
        k: [B, Hkv, Tk, D].
        v: as ``k``.
        key_ranges: int32 [B or 1, 4, Tq], the keys of every query.
        query_ranges: int32 [B or 1, 4, Tk], the queries of every key.
        query_work: int32 [B or 1, programs, 20], see ``worklist.py``.
        key_work: the same for programs that own keys.
        noised: keys lie as [xt ; x0], not as x0 alone.
        scale: of the scores.

    Returns:
        [B, H, Tq, D], and float32 [B, H, Tq] log2-sum-exp of the scaled scores (not
        differentiable; +inf where a query sees nothing).
    """
    from bd3lm.model.attention.hopper.launch import run_forward

    return run_forward(q, k, v, key_ranges, query_work, noised, scale)


hopper_attention.register_fake(fake_forward)


@torch.library.custom_op("bd3lm::hopper_attention_backward", mutates_args=())
def hopper_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_ranges: Tensor,
    query_ranges: Tensor,
    query_work: Tensor,
    key_work: Tensor,
    noised: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as :func:`hopper_attention` took and gave them."""
    from bd3lm.model.attention.hopper.launch import run_backward

    return run_backward(
        dout, q, k, v, out, lse, key_ranges, query_ranges, query_work, key_work, noised, scale
    )


hopper_attention_backward.register_fake(fake_backward)
hopper_attention.register_autograd(
    gradients_by("hopper_attention_backward"), setup_context=save_for_gradients
)
