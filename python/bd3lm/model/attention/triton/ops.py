"""The kernels as PyTorch operators, with shapes for tracing and gradients.

``torch.compile`` sees each as one opaque node (no graph break), fake tensors and activation
checkpointing go through :func:`torch.library`. Triton is imported when one is first run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def empty_rows_like(x: Tensor) -> Tensor:
    """Fake output of ``x``'s shape, with the strides that the launch module gives it."""
    batch, heads, rows, width = x.shape
    return x.new_empty(batch, rows, heads, width).transpose(1, 2)


@torch.library.custom_op("bd3lm::block_attention", mutates_args=())
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: Tensor,
    query_ranges: Tensor,
    noised: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention under a mask of ranges (docs/math.md §7).

    Args:
        q: [B, H, Tq, D].
        k: [B, Hkv, Tk, D].
        v: as ``k``.
        key_ranges: int32 [B or 1, 4, Tq], the keys of every query.
        query_ranges: int32 [B or 1, 4, Tk], the queries of every key.
        noised: keys lie as [xt ; x0], not as x0 alone.
        scale: of the scores.

    Returns:
        [B, H, Tq, D], and float32 [B, H, Tq] log2-sum-exp of the scaled scores (not
        differentiable; +inf where a query sees nothing).
    """
    from bd3lm.model.attention.triton.launch import run_forward

    return run_forward(q, k, v, key_ranges, noised, scale)


@block_attention.register_fake
def _(q: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return empty_rows_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("bd3lm::block_attention_backward", mutates_args=())
def block_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_ranges: Tensor,
    query_ranges: Tensor,
    noised: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as :func:`block_attention` took and gave them."""
    from bd3lm.model.attention.triton.launch import run_backward

    return run_backward(dout, q, k, v, out, lse, key_ranges, query_ranges, noised, scale)


@block_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows_like(q), empty_rows_like(k), empty_rows_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_ranges, query_ranges, ctx.noised, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, key_ranges, query_ranges)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.bd3lm.block_attention_backward(
        dout, *ctx.saved_tensors, ctx.noised, ctx.scale
    )
    return (*gradients, None, None, None, None)


block_attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("bd3lm::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor | None,
    lo: Tensor,
    hi: Tensor,
    scale: float,
    chunks: int,
) -> Tensor:
    """A few queries over a long cache; no gradient.

    Args:
        q: [B, H, Tq, D].
        k: [B, Hkv, T, D], or with ``pages`` the pool [P, Hkv, page size, D].
        v: as ``k``.
        pages: int32 [B, N] or None: the pages of each row, in order.
        lo: int32 [B or 1, Tq], first key of every query.
        hi: int32 [B or 1, Tq], one past its last.
        scale: of the scores.
        chunks: programs that share the keys of one tile; 0 chooses.

    Returns:
        [B, H, Tq, D].
    """
    from bd3lm.model.attention.triton.launch import run_decode

    return run_decode(q, k, v, pages, lo, hi, scale, chunks)


@decode_attention.register_fake
def _(q: Tensor, *_rest: object) -> Tensor:
    return empty_rows_like(q)
