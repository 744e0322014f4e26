"""Forward kernel for Hopper in Gluon: TMA, mbarriers, WGMMA and warp specialization.

A program owns two tiles of 64 queries, one for each of two consumer warpgroups, and loads every
tile of keys that either of them sees once, for both. ``worklist.py`` says which queries and keys.
One more warp loads K and V into rings of buffers (``common.py``).

A consumer starts the scores of one tile of keys, then the product with the values of the tile
before it, and takes the softmax of the former while the latter runs (docs/math.md §7).

Shapes: B batch, H query heads, Hkv key heads, Tq queries, L positions of a stream, D head width,
BM queries of a tile, BN keys of a tile.
"""

# Gluon is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportMissingImports=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# ruff: noqa: ANN001, ANN201, N803, N806  (Gluon gives arguments their types; capitals are pointers)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bd3lm.model.attention.hopper.common import (
    is_full,
    is_seen,
    load,
    load_bounds,
    pass_over,
    place,
    store_tile,
    tile_of_step,
    work_of_program,
    work_of_tile,
)


@gluon.jit
def loader(
    q_desc, k_desc, v_desc, WORK, q_tiles, k_ring, v_ring, bars, batch, head, kv_head, clean_stream,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads both tiles of queries, then keys and values in the order of the worklist."""
    q_full, k_full, k_free, v_full, v_free = bars
    for g in gl.static_range(2):
        rows, _, _ = work_of_tile(WORK, g)
        mbarrier.expect(q_full.index(g), BM * D * 2)
        load(q_desc, [batch, head, rows[0], rows[1], 0], q_full.index(g), q_tiles.index(g))
    work = work_of_program(WORK)
    for t in range(0, work[3]):
        stage = t % STAGES
        phase = (t // STAGES) & 1
        tile, noised = tile_of_step(t, work)
        row = tile * BN
        stream = gl.where(noised, 0, clean_stream)
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), BN * D * 2)
        load(k_desc, [batch, kv_head, stream, row, 0], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), BN * D * 2)
        load(v_desc, [batch, kv_head, stream, row, 0], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def softmax(s, peak, total, scale, t, work, full, bounds, BN: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Fold the scores [BM, BN] of step ``t`` into peak and total; gives weights and decay, too.

    ``peak`` is the largest scaled score so far, in units of log 2, or -inf.
    """
    if not is_full(t, full):
        tile, noised = tile_of_step(t, work)
        key = tile * BN + gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(is_seen(key, noised, bounds), s, float("-inf"))
    new = gl.maximum(peak, gl.max(s, 1) * scale)
    safe = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(s * scale - safe[:, None])
    decay = gl.exp2(peak - safe)
    return p, decay, new, total * decay + gl.sum(p, 1)


@gluon.jit
def consumer(
    OUT, LSE, RANGES, WORK, scale, q_tiles, k_ring, v_ring, bars, queries, length, stride_ot,
    g: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of tile ``g`` of queries; pointers begin at this row and head."""
    q_full, k_full, k_free, v_full, v_free = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)

    work = work_of_program(WORK)
    rows, part, full = work_of_tile(WORK, g)
    stream, start = rows
    begin, end = part
    # Rows past the end of a stream repeat its last one, and are not stored.
    row = stream * length + gl.minimum(start + gl.arange(0, BM, ROW), length - 1)
    bounds = load_bounds(RANGES, queries, row)
    peak = gl.full([BM], float("-inf"), gl.float32, ROW)
    total = gl.full([BM], 0.0, gl.float32, ROW)
    acc = gl.zeros([BM, D], gl.float32, O_LAYOUT)
    zero = gl.zeros([BM, BN], gl.float32, S_LAYOUT)

    mbarrier.wait(q_full.index(g), 0)
    q = q_tiles.index(g).reshape([BM, D])
    for t in range(0, begin):
        pass_over(t, k_full, k_free, STAGES)
        pass_over(t, v_full, v_free, STAGES)
    if end > begin:
        stage = begin % STAGES
        mbarrier.wait(k_full.index(stage), (begin // STAGES) & 1)
        k = k_ring.index(stage).reshape([BN, D]).permute((1, 0))
        s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(stage), count=1)
        p, decay, peak, total = softmax(
            s, peak, total, scale, begin, work, full, bounds, BN, S_LAYOUT
        )
        for t in range(begin + 1, end):
            stage = t % STAGES
            last = (t - 1) % STAGES
            mbarrier.wait(k_full.index(stage), (t // STAGES) & 1)
            k = k_ring.index(stage).reshape([BN, D]).permute((1, 0))
            s_next = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            acc = acc * gl.convert_layout(decay, ROW_O)[:, None]
            mbarrier.wait(v_full.index(last), ((t - 1) // STAGES) & 1)
            v = v_ring.index(last).reshape([BN, D])
            weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
            acc_next = warpgroup_mma(weights, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_next,))
            mbarrier.arrive(k_free.index(stage), count=1)
            p, decay, peak, total = softmax(
                s, peak, total, scale, t, work, full, bounds, BN, S_LAYOUT
            )
            acc = warpgroup_mma_wait(0, deps=(acc_next,))
            mbarrier.arrive(v_free.index(last), count=1)
        last = (end - 1) % STAGES
        acc = acc * gl.convert_layout(decay, ROW_O)[:, None]
        mbarrier.wait(v_full.index(last), ((end - 1) // STAGES) & 1)
        v = v_ring.index(last).reshape([BN, D])
        weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
        acc_next = warpgroup_mma(weights, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc_next,))
        mbarrier.arrive(v_free.index(last), count=1)
    for t in range(end, work[3]):
        pass_over(t, k_full, k_free, STAGES)
        pass_over(t, v_full, v_free, STAGES)

    empty = total == 0.0
    safe = gl.where(empty, 1.0, total)
    out = acc / gl.convert_layout(safe, ROW_O)[:, None]
    store_tile(OUT, out, stream, start, length, stride_ot, BM, D, dtype)
    row = gl.arange(0, BM, ROW)
    lse = gl.where(empty, float("inf"), peak + gl.log2(safe))
    gl.store(LSE + stream * length + start + row, lse, mask=start + row < length)


@gluon.jit(
    do_not_specialize=(
        "pairs", "section", "ranks", "heads", "group", "queries", "length", "clean_stream",
        "stride_rb", "stride_wb",
    )
)  # fmt: skip
def forward_kernel(
    q_desc, k_desc, v_desc, OUT, LSE, RANGES, WORK,
    scale, pairs, section, ranks, heads, group, queries, length, clean_stream,
    stride_ob, stride_oh, stride_ot, stride_rb, stride_wb,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Two tiles of queries of one head; grid (ranks * pairs), ``num_warps`` of 4.

    The descriptors are of q [B, H, streams, L, D] and of k, v [B, Hkv, streams, L, D], in blocks
    [1, 1, 1, BM or BN, D]: rows past the end of a stream are read as zeros. OUT is [B, H, Tq, D] by
    strides, LSE float32 [B, H, Tq] (log2 of the sum of exponentials, +inf where a row sees
    nothing), RANGES int32 [B or 1, 4, Tq] with batch stride ``stride_rb`` (0 where shared), WORK
    int32 [B or 1, ranks, 20] with batch stride ``stride_wb``. ``scale`` is log2(e) / sqrt(D),
    ``group`` the query heads of a key head, ``queries`` is Tq, ``length`` the queries of a stream,
    ``clean_stream`` the index of the stream of clean keys. ``pairs`` is B * H, of which ``section``
    at a time share the L2 cache. A consumer has ``REGISTERS`` a thread.
    """
    dtype: gl.constexpr = q_desc.dtype
    rank, pair = place(gl.program_id(0), ranks, pairs, section)
    head = pair % heads
    batch = pair // heads
    q_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, 1, BM, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 1, BN, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 1, BN, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(q_full.index(j), count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(v_full.index(j), count=1)
        mbarrier.init(k_free.index(j), count=2)
        mbarrier.init(v_free.index(j), count=2)
    fence_async_shared()
    bars = (q_full, k_full, k_free, v_full, v_free)
    OUT += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    LSE += pair.to(gl.int64) * queries
    RANGES += batch.to(gl.int64) * stride_rb
    WORK += batch.to(gl.int64) * stride_wb + rank * 20
    gl.warp_specialize([
        (consumer, (OUT, LSE, RANGES, WORK, scale, q_tiles, k_ring, v_ring, bars, queries, length,
                    stride_ot, 0, BM, BN, D, STAGES, dtype)),
        (consumer, (OUT, LSE, RANGES, WORK, scale, q_tiles, k_ring, v_ring, bars, queries, length,
                    stride_ot, 1, BM, BN, D, STAGES, dtype)),
        (loader, (q_desc, k_desc, v_desc, WORK, q_tiles, k_ring, v_ring, bars, batch, head,
                  head // group, clean_stream, BM, BN, D, STAGES)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
