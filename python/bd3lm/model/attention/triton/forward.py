"""Forward kernel: online softmax over the tiles that a tile of queries sees (docs/math.md §7).

Shapes: B batch, H query heads, Tq queries, L positions of a key stream, D head width (DP: padded
to a power of two), BM queries of a tile, BN keys of a tile.
"""

# Triton's language is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportMissingImports=false
# ruff: noqa: ANN001, ANN201, N803  (Triton gives arguments their types; capitals are pointers)
from __future__ import annotations

import triton
import triton.language as tl

from bd3lm.model.attention.triton.common import (
    SIZES,
    cast,
    dot,
    load_ranges,
    load_rows,
    load_rows_below,
    nth_full,
    nth_partial,
    own_tile,
    store_rows,
    tiles_met,
)


@triton.jit
def softmax_step(acc, total, peak, scores, v, scale, GUARD: tl.constexpr, INTERPRET: tl.constexpr):
    """Fold the scores [BM, BN] of one tile into the running sums.

    ``peak`` is the largest scaled score so far, in units of log 2; with ``GUARD`` it may stay
    -inf, where a row has not seen any key yet.
    """
    new = tl.maximum(peak, tl.max(scores, 1) * scale)
    safe = new
    if GUARD:
        safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores * scale - safe[:, None])
    decay = tl.exp2(peak - safe)
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    acc = dot(cast(p, v.dtype, INTERPRET), v, acc, INTERPRET)
    return acc, total, new


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, OUT, LSE, RANGES,
    scale, pairs, section, heads, group, queries, stream_queries, keys, clean_offset,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot, stride_rb,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; grid (streams * ceil(stream_queries / BM) * B * H).

    Q, K, V and OUT are [B, heads, T, D] by strides, the last one 1. LSE is float32 [B, H, Tq], the
    log2 of the sum of exponentials, +inf where a row sees nothing. RANGES is int32 [B or 1, 4, Tq]
    with batch stride ``stride_rb`` (0 where shared). ``scale`` is log2(e) / sqrt(D), ``group`` the
    query heads of a key head; ``queries`` is Tq, of which each stream has ``stream_queries``;
    ``keys`` is L, and clean keys begin at row ``clean_offset``, noised ones at row 0. ``pairs`` is
    B * H, of which ``section`` at a time share the L2 cache.
    """
    batch, head, start, row, row_ok = own_tile(
        queries, stream_queries, pairs, section, heads, True, BM
    )
    c_lo, c_hi, n_lo, n_hi = load_ranges(RANGES, batch, stride_rb, queries, start + row)
    full, partial = tiles_met(c_lo, c_hi, n_lo, n_hi, BN)

    q = load_rows(Q + batch * stride_qb + head * stride_qh, start, row, stride_qt, D, DP)
    k_base = K + batch * stride_kb + (head // group) * stride_kh
    v_base = V + batch * stride_vb + (head // group) * stride_vh
    acc = tl.zeros([BM, DP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    col = tl.arange(0, BN)

    for t in range(0, full[3]):
        index, noised = nth_full(t, full)
        first = tl.where(noised, 0, clean_offset) + index * BN
        k = load_rows(k_base, first, col, stride_kt, D, DP)
        v = load_rows(v_base, first, col, stride_vt, D, DP)
        scores = dot(q, tl.trans(k), None, INTERPRET)
        acc, total, peak = softmax_step(acc, total, peak, scores, v, scale, False, INTERPRET)

    for t in range(0, partial[7]):
        index, noised = nth_partial(t, partial)
        offset = tl.where(noised, 0, clean_offset)
        key = index * BN + col
        k = load_rows_below(k_base, index * BN, col, offset, keys, stride_kt, D, DP)
        v = load_rows_below(v_base, index * BN, col, offset, keys, stride_vt, D, DP)
        lo = tl.where(noised, n_lo, c_lo)
        hi = tl.where(noised, n_hi, c_hi)
        seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        scores = tl.where(seen, dot(q, tl.trans(k), None, INTERPRET), float("-inf"))
        acc, total, peak = softmax_step(acc, total, peak, scores, v, scale, True, INTERPRET)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = cast(acc / total[:, None], OUT.dtype.element_ty, INTERPRET)
    base = OUT + batch * stride_ob + head * stride_oh
    store_rows(base, start, row, row_ok, stride_ot, out, D, DP)
    lse = tl.where(empty, float("inf"), peak + tl.log2(total))
    tl.store(LSE + (batch * heads + head) * queries + start + row, lse, mask=row_ok)
