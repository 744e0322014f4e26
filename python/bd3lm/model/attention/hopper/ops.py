"""The Hopper kernels as PyTorch operators, as those of ``triton/ops.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bd3lm.model.attention.triton.ops import empty_rows_like


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


@hopper_attention.register_fake
def _(q: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return empty_rows_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


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


@hopper_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows_like(q), empty_rows_like(k), empty_rows_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *mask, ctx.noised, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, *mask)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.bd3lm.hopper_attention_backward(
        dout, *ctx.saved_tensors, ctx.noised, ctx.scale
    )
    return (*gradients, *[None] * 6)


hopper_attention.register_autograd(_backward, setup_context=_save)
