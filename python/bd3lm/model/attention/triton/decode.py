"""Decoding kernels: a few queries over a long cache, the keys split between programs.

Shapes: B batch, H query heads, Tq queries (S, or 2S with a fused commit), D head width (DP:
padded), BM rows (query, head of the group) of a tile, BN keys of a tile, C chunks of the keys.
The query heads of one key head share a tile, so the cache is read once a group (docs/math.md §8).
"""

# Triton's language is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportMissingImports=false
# ruff: noqa: ANN001, ANN201, N803  (Triton gives arguments their types; capitals are pointers)
from __future__ import annotations

import triton
import triton.language as tl

from bd3lm.model.attention.triton.common import SIZES, cast, dot
from bd3lm.model.attention.triton.forward import softmax_step


@triton.jit
def key_rows(PAGES, batch, key, inside, stride_b, stride_t, page_width, PAGE: tl.constexpr):
    """Offset of each key of a batch row: by its page (``PAGE`` keys each), or plainly."""
    if PAGE == 0:
        return batch * stride_b + key.to(tl.int64) * stride_t
    page = tl.load(PAGES + batch * page_width + key // PAGE, mask=inside, other=0)
    return page.to(tl.int64) * stride_b + (key % PAGE) * stride_t


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    Q, K, V, PAGES, LO, HI, PART, PART_LSE,
    scale, heads, group, queries, chunks, page_width,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_rb,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One chunk of the keys of one tile of rows; grid (ceil(group * Tq / BM) * B * Hkv, C).

    K and V are [B, Hkv, T, D] by strides, or pages [P, Hkv, PAGE, D] where ``stride_kb`` leads from
    page to page, PAGES being the pages of each row, int32 [B, page_width]. LO and HI are the keys
    of each query, int32 [B or 1, Tq] with batch stride ``stride_rb``. PART is float32
    [C, B, H, Tq, D], PART_LSE its log2-sum-exp, -inf where a chunk holds no key of the row.
    ``heads`` is Hkv.
    """
    row_tiles = tl.cdiv(group * queries, BM)
    pair = tl.program_id(0) // row_tiles
    head = (pair % heads).to(tl.int64)
    batch = (pair // heads).to(tl.int64)
    chunk = tl.program_id(1)

    row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    row_ok = row < group * queries
    row = tl.minimum(row, group * queries - 1)
    query = row % queries
    q_head = head * group + row // queries
    lo = tl.load(LO + batch * stride_rb + query)
    hi = tl.load(HI + batch * stride_rb + query)
    end = tl.max(tl.where(hi > lo, hi, 0), 0)
    first = tl.minimum(tl.min(tl.where(hi > lo, lo, end), 0), end) // BN
    tiles = tl.cdiv(end, BN) - first
    each = tl.cdiv(tiles, chunks)

    col = tl.arange(0, DP)
    q_ptr = Q + batch * stride_qb + (q_head * stride_qh + query * stride_qt)[:, None] + col[None, :]
    q = tl.load(q_ptr, mask=(col < D)[None, :], other=0.0)
    k_base = K + head * stride_kh
    v_base = V + head * stride_vh
    acc = tl.zeros([BM, DP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    for t in range(chunk * each, tl.minimum(chunk * each + each, tiles)):
        key = (first + t) * BN + tl.arange(0, BN)
        inside = key < end
        k_row = key_rows(PAGES, batch, key, inside, stride_kb, stride_kt, page_width, PAGE)
        v_row = key_rows(PAGES, batch, key, inside, stride_vb, stride_vt, page_width, PAGE)
        wanted = inside[:, None] & (col < D)[None, :]
        k = tl.load(k_base + k_row[:, None] + col[None, :], mask=wanted, other=0.0)
        v = tl.load(v_base + v_row[:, None] + col[None, :], mask=wanted, other=0.0)
        seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        scores = tl.where(seen, dot(q, tl.trans(k), None, INTERPRET), float("-inf"))
        acc, total, peak = softmax_step(acc, total, peak, scores, v, scale, True, INTERPRET)

    safe = tl.where(total == 0.0, 1.0, total)
    pairs = tl.num_programs(0) // row_tiles
    out_row = (chunk.to(tl.int64) * pairs + pair) * group * queries + row
    out_ptr = PART + out_row[:, None] * D + col[None, :]
    tl.store(out_ptr, acc / safe[:, None], mask=row_ok[:, None] & (col < D)[None, :])
    tl.store(PART_LSE + out_row, peak + tl.log2(safe), mask=row_ok)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    PART, PART_LSE, OUT, heads, queries, chunks, rows, stride_ob, stride_oh, stride_ot,
    D: tl.constexpr, DP: tl.constexpr, CP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Weigh the chunks of one row by exp2(lse - max); grid (B * H * Tq), CP chunks, padded."""
    row = tl.program_id(0)
    chunk = tl.arange(0, CP)
    col = tl.arange(0, DP)
    used = chunk < chunks
    source = chunk.to(tl.int64) * rows + row
    lse = tl.load(PART_LSE + source, mask=used, other=float("-inf"))
    peak = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total == 0.0, 1.0, total)
    part = tl.load(
        PART + source[:, None] * D + col[None, :],
        mask=used[:, None] & (col < D)[None, :],
        other=0.0,
    )
    out = tl.sum(part * weight[:, None], 0)
    query = row % queries
    head = row // queries % heads
    batch = (row // queries // heads).to(tl.int64)
    target = OUT + batch * stride_ob + head * stride_oh + query * stride_ot + col
    tl.store(target, cast(out, OUT.dtype.element_ty, INTERPRET), mask=col < D)
