"""The kernels as PyTorch operators, with shapes for tracing and gradients.

``torch.compile`` sees each as one opaque node (no graph break), fake tensors and activation
checkpointing go through :func:`torch.library`. Triton is imported when one is first run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def empty_rows_like(x: Tensor) -> Tensor:
    """Fake output of ``x``'s shape, with the strides that the launch module gives it."""
    batch, heads, rows, width = x.shape
    return x.new_empty(batch, rows, heads, width).transpose(1, 2)


def fake_forward(q: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    """Fake outputs of an attention operator: out and lse."""
    return empty_rows_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake gradients of q, k and v."""
    return empty_rows_like(q), empty_rows_like(k), empty_rows_like(v)


def save_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep q, k, v, outputs and the tensors of the mask; the last two inputs are no tensors."""
    q, k, v, *mask, ctx.noised, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, *mask)


def gradients_by(operator: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward function of an attention operator, from the name of its gradients' operator."""

    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = getattr(torch.ops.bd3lm, operator)(dout, *saved, ctx.noised, ctx.scale)
        return (*gradients, *[None] * (len(saved) - 3))  # outputs are saved, noised and scale not

    return backward


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


block_attention.register_fake(fake_forward)


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


block_attention_backward.register_fake(fake_backward)
block_attention.register_autograd(
    gradients_by("block_attention_backward"), setup_context=save_for_gradients
)


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
