"""Backward kernels: delta, dK/dV and dQ (docs/math.md §7). Each row is written once: no atomics.

With P = exp2(S - lse), dP = dO Vᵀ and delta = rowsum(dO * O): dS = P * (dP - delta),
dV = Pᵀ dO, dK = dSᵀ Q / sqrt(D), dQ = dS K / sqrt(D). Shapes as in the forward kernel; dK/dV walks
the transposed mask, whose ranges are queries of each key.
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


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    OUT, DOUT, DELTA, heads, queries,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Sum out * dout over D into delta [B, H, Tq]; grid (B * H, ceil(Tq / BM))."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = (tl.program_id(0) // heads).to(tl.int64)
    start = tl.program_id(1) * BM
    row = tl.arange(0, BM)
    row_ok = row < queries - start
    row = tl.minimum(row, queries - start - 1)
    out = load_rows(OUT + batch * stride_ob + head * stride_oh, start, row, stride_ot, D, DP)
    dout = load_rows(DOUT + batch * stride_gb + head * stride_gh, start, row, stride_gt, D, DP)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(DELTA + (batch * heads + head) * queries + start + row, delta, mask=row_ok)


@triton.jit
def key_step(dk, dv, k, v, q, dout, probs, delta, INTERPRET: tl.constexpr):
    """Add one tile of queries to dk, dv [BN, DP]; ``probs`` is Pᵀ [BN, BM]."""
    dv = dot(cast(probs, dout.dtype, INTERPRET), dout, dv, INTERPRET)
    dprobs = dot(v, tl.trans(dout), None, INTERPRET)
    dscores = probs * (dprobs - delta[None, :])
    dk = dot(cast(dscores, q.dtype, INTERPRET), q, dk, INTERPRET)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, RANGES,
    scale, inv_sqrt, pairs, section, heads, group, queries, stream_queries, keys, stream_keys,
    clean_offset,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_gb, stride_gh, stride_gt,
    stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt, stride_rb,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys; grid (streams * ceil(stream_keys / BN) * B * Hkv).

    RANGES is int32 [B or 1, 4, Tk]: the clean and the noised queries that see each key. ``heads``
    is Hkv, each answering ``group`` query heads, which are summed here; ``keys`` is Tk, of which
    each stream has ``stream_keys``; clean queries begin at row ``clean_offset``. ``scale`` is
    log2(e) / sqrt(D) and ``inv_sqrt`` 1 / sqrt(D). ``pairs`` is B * Hkv.
    """
    batch, head, start, row, row_ok = own_tile(keys, stream_keys, pairs, section, heads, False, BN)
    c_lo, c_hi, n_lo, n_hi = load_ranges(RANGES, batch, stride_rb, keys, start + row)
    full, partial = tiles_met(c_lo, c_hi, n_lo, n_hi, BM)

    k = load_rows(K + batch * stride_kb + head * stride_kh, start, row, stride_kt, D, DP)
    v = load_rows(V + batch * stride_vb + head * stride_vh, start, row, stride_vt, D, DP)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    col = tl.arange(0, BM)
    for member in range(0, group):
        q_head = head * group + member
        q_base = Q + batch * stride_qb + q_head * stride_qh
        g_base = DOUT + batch * stride_gb + q_head * stride_gh
        lse_base = LSE + (batch * heads * group + q_head) * queries
        delta_base = DELTA + (batch * heads * group + q_head) * queries

        for t in range(0, full[3]):
            index, noised = nth_full(t, full)
            first = tl.where(noised, 0, clean_offset) + index * BM
            q = load_rows(q_base, first, col, stride_qt, D, DP)
            dout = load_rows(g_base, first, col, stride_gt, D, DP)
            lse = tl.load(lse_base + first + col)
            delta = tl.load(delta_base + first + col)
            scores = dot(k, tl.trans(q), None, INTERPRET)
            probs = tl.exp2(scores * scale - lse[None, :])
            dk, dv = key_step(dk, dv, k, v, q, dout, probs, delta, INTERPRET)

        for t in range(0, partial[7]):
            index, noised = nth_partial(t, partial)
            offset = tl.where(noised, 0, clean_offset)
            query = index * BM + col
            inside = query < stream_queries
            first = index * BM
            q = load_rows_below(q_base, first, col, offset, stream_queries, stride_qt, D, DP)
            dout = load_rows_below(g_base, first, col, offset, stream_queries, stride_gt, D, DP)
            lse = tl.load(lse_base + offset + query, mask=inside, other=float("inf"))
            delta = tl.load(delta_base + offset + query, mask=inside, other=0.0)
            lo = tl.where(noised, n_lo, c_lo)
            hi = tl.where(noised, n_hi, c_hi)
            seen = (query[None, :] >= lo[:, None]) & (query[None, :] < hi[:, None])
            scores = dot(k, tl.trans(q), None, INTERPRET)
            probs = tl.where(seen, tl.exp2(scores * scale - lse[None, :]), 0.0)
            dk, dv = key_step(dk, dv, k, v, q, dout, probs, delta, INTERPRET)

    dk = cast(dk * inv_sqrt, DK.dtype.element_ty, INTERPRET)
    base = DK + batch * stride_dkb + head * stride_dkh
    store_rows(base, start, row, row_ok, stride_dkt, dk, D, DP)
    dv = cast(dv, DV.dtype.element_ty, INTERPRET)
    base = DV + batch * stride_dvb + head * stride_dvh
    store_rows(base, start, row, row_ok, stride_dvt, dv, D, DP)


@triton.jit
def query_step(dq, dout, k, v, probs, delta, INTERPRET: tl.constexpr):
    """Add one tile of keys to dq [BM, DP]; ``probs`` is P [BM, BN]."""
    dprobs = dot(dout, tl.trans(v), None, INTERPRET)
    dscores = probs * (dprobs - delta[:, None])
    return dot(cast(dscores, k.dtype, INTERPRET), k, dq, INTERPRET)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    Q, K, V, DOUT, LSE, DELTA, DQ, RANGES,
    scale, inv_sqrt, pairs, section, heads, group, queries, stream_queries, keys, clean_offset,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_gb, stride_gh, stride_gt,
    stride_dqb, stride_dqh, stride_dqt, stride_rb,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries; grid and arguments as in the forward kernel."""
    batch, head, start, row, row_ok = own_tile(
        queries, stream_queries, pairs, section, heads, True, BM
    )
    c_lo, c_hi, n_lo, n_hi = load_ranges(RANGES, batch, stride_rb, queries, start + row)
    full, partial = tiles_met(c_lo, c_hi, n_lo, n_hi, BN)

    q = load_rows(Q + batch * stride_qb + head * stride_qh, start, row, stride_qt, D, DP)
    dout = load_rows(DOUT + batch * stride_gb + head * stride_gh, start, row, stride_gt, D, DP)
    lse = tl.load(LSE + (batch * heads + head) * queries + start + row)
    delta = tl.load(DELTA + (batch * heads + head) * queries + start + row)
    k_base = K + batch * stride_kb + (head // group) * stride_kh
    v_base = V + batch * stride_vb + (head // group) * stride_vh
    dq = tl.zeros([BM, DP], tl.float32)
    col = tl.arange(0, BN)

    for t in range(0, full[3]):
        index, noised = nth_full(t, full)
        first = tl.where(noised, 0, clean_offset) + index * BN
        k = load_rows(k_base, first, col, stride_kt, D, DP)
        v = load_rows(v_base, first, col, stride_vt, D, DP)
        scores = dot(q, tl.trans(k), None, INTERPRET)
        probs = tl.exp2(scores * scale - lse[:, None])
        dq = query_step(dq, dout, k, v, probs, delta, INTERPRET)

    for t in range(0, partial[7]):
        index, noised = nth_partial(t, partial)
        offset = tl.where(noised, 0, clean_offset)
        key = index * BN + col
        k = load_rows_below(k_base, index * BN, col, offset, keys, stride_kt, D, DP)
        v = load_rows_below(v_base, index * BN, col, offset, keys, stride_vt, D, DP)
        lo = tl.where(noised, n_lo, c_lo)
        hi = tl.where(noised, n_hi, c_hi)
        seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        scores = dot(q, tl.trans(k), None, INTERPRET)
        probs = tl.where(seen, tl.exp2(scores * scale - lse[:, None]), 0.0)
        dq = query_step(dq, dout, k, v, probs, delta, INTERPRET)

    dq = cast(dq * inv_sqrt, DQ.dtype.element_ty, INTERPRET)
    base = DQ + batch * stride_dqb + head * stride_dqh
    store_rows(base, start, row, row_ok, stride_dqt, dq, D, DP)
