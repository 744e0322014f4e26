"""Gradients for Hopper in Gluon: dQ by tiles of queries, dK and dV by tiles of keys, no atomics.

One kernel does both. A program *owns* two tiles of 64 rows, one for each consumer warpgroup, and
*meets* tiles of the other axis in the order of its worklist, which one more warp loads as in
``forward.py``. To compute dQ it owns queries (Q and dO) and meets keys (K and V); to compute dK and
dV it owns keys (K and V) and meets queries (Q and dO) of every query head of the group. Either way
the scores are the product of the first matrices, dP that of the second ones (docs/math.md §7):

    S = own₁ met₁ᵀ,  dP = own₂ met₂ᵀ,  P = exp2(S - lse),  dS = P * (dP - delta)
    dQ or dK = dS met₁ / sqrt(D),  dV = P met₂

Shapes: B batch, D head width, BM rows of an owned tile, BN rows of a tile that is met.
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
def gradient_loader(
    own1, own2, met1, met2, WORK, own_tiles1, own_tiles2, ring1, ring2, bars,
    batch, own_head, met_head, met_heads, clean_stream,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads both owned tiles, then what they meet, head by head."""
    own_full, full, free = bars
    for g in gl.static_range(2):
        rows, _, _ = work_of_tile(WORK, g)
        mbarrier.expect(own_full.index(g), 2 * BM * D * 2)
        start = [batch, own_head, rows[0], rows[1], 0]
        load(own1, start, own_full.index(g), own_tiles1.index(g))
        load(own2, start, own_full.index(g), own_tiles2.index(g))
    work = work_of_program(WORK)
    steps = work[3]
    for h in range(0, met_heads):
        for t in range(0, steps):
            stage = (h * steps + t) % STAGES
            phase = ((h * steps + t) // STAGES) & 1
            tile, noised = tile_of_step(t, work)
            row = tile * BN
            stream = gl.where(noised, 0, clean_stream)
            head = met_head + h
            mbarrier.wait(free.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), 2 * BN * D * 2)
            load(met1, [batch, head, stream, row, 0], full.index(stage), ring1.index(stage))
            load(met2, [batch, head, stream, row, 0], full.index(stage), ring2.index(stage))


@gluon.jit
def gradient_consumer(
    OUT1, OUT2, LSE, DELTA, RANGES, WORK, scale, inv_sqrt, own_tiles1, own_tiles2, ring1, ring2,
    bars, met_heads, rows, length, met_rows, met_length, clean_stream, stride_t,
    g: gl.constexpr, OWN_QUERIES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Gradient of owned tile ``g``; LSE and DELTA begin at the first query head."""
    own_full, full, free = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)

    work = work_of_program(WORK)
    steps = work[3]
    own_rows, part, whole = work_of_tile(WORK, g)
    stream, start = own_rows
    begin, end = part
    # Rows past the end of a stream repeat its last one, and are not stored.
    row = stream * length + gl.minimum(start + gl.arange(0, BM, ROW), length - 1)
    bounds = load_bounds(RANGES, rows, row)
    if OWN_QUERIES:
        lse = gl.load(LSE + row)[:, None]
        delta = gl.load(DELTA + row)[:, None]
    acc1 = gl.zeros([BM, D], gl.float32, O_LAYOUT)
    acc2 = gl.zeros([BM, D], gl.float32, O_LAYOUT)
    zero = gl.zeros([BM, BN], gl.float32, S_LAYOUT)

    mbarrier.wait(own_full.index(g), 0)
    own1 = own_tiles1.index(g).reshape([BM, D])
    own2 = own_tiles2.index(g).reshape([BM, D])
    for h in range(0, met_heads):
        for t in range(0, begin):
            pass_over(h * steps + t, full, free, STAGES)
        for t in range(begin, end):
            stage = (h * steps + t) % STAGES
            phase = ((h * steps + t) // STAGES) & 1
            tile, noised = tile_of_step(t, work)
            met = tile * BN + gl.arange(0, BN, COL)
            if not OWN_QUERIES:
                # Before the waits, which hide what these loads take.
                query = gl.where(noised, 0, clean_stream) * met_length
                query = h * met_rows + query + gl.minimum(met, met_length - 1)
                lse = gl.load(LSE + query)[None, :]
                delta = gl.load(DELTA + query)[None, :]
            mbarrier.wait(full.index(stage), phase)
            met1 = ring1.index(stage).reshape([BN, D])
            met2 = ring2.index(stage).reshape([BN, D])
            s_next = warpgroup_mma(own1, met1.permute((1, 0)), zero, use_acc=False, is_async=True)
            d_next = warpgroup_mma(own2, met2.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_next,))
            p = gl.exp2(s * scale - lse)
            if not is_full(t, whole):
                p = gl.where(is_seen(met, noised, bounds), p, 0.0)
            if OWN_QUERIES:
                d = warpgroup_mma_wait(0, deps=(d_next,))
                ds = gl.convert_layout((p * (d - delta)).to(dtype), P_LAYOUT)
                acc1_next = warpgroup_mma(ds, met1, acc1, is_async=True)
                acc1 = warpgroup_mma_wait(0, deps=(acc1_next,))
            else:
                # dV runs while dS is computed.
                weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
                acc2_next = warpgroup_mma(weights, met2, acc2, is_async=True)
                d = warpgroup_mma_wait(1, deps=(d_next,))
                ds = gl.convert_layout((p * (d - delta)).to(dtype), P_LAYOUT)
                acc1_next = warpgroup_mma(ds, met1, acc1, is_async=True)
                acc1, acc2 = warpgroup_mma_wait(0, deps=(acc1_next, acc2_next))
            mbarrier.arrive(free.index(stage), count=1)
        for t in range(end, steps):
            pass_over(h * steps + t, full, free, STAGES)

    store_tile(OUT1, acc1 * inv_sqrt, stream, start, length, stride_t, BM, D, dtype)
    if not OWN_QUERIES:
        store_tile(OUT2, acc2, stream, start, length, stride_t, BM, D, dtype)


@gluon.jit(
    do_not_specialize=(
        "pairs", "section", "ranks", "heads", "group", "query_heads", "rows", "length", "met_rows",
        "met_length", "clean_stream", "stride_rb", "stride_wb",
    )
)  # fmt: skip
def gradient_kernel(
    own1, own2, met1, met2, OUT1, OUT2, LSE, DELTA, RANGES, WORK,
    scale, inv_sqrt, pairs, section, ranks, heads, group, query_heads, rows, length, met_rows,
    met_length, clean_stream,
    stride_ob, stride_oh, stride_ot, stride_rb, stride_wb,
    OWN_QUERIES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Two owned tiles of one head; grid (ranks * pairs), ``num_warps`` of 4.

    The descriptors are as in the forward kernel. With OWN_QUERIES OUT1 is dQ, else OUT1 is dK and
    OUT2 dV, both [B, heads, rows, D] by the same strides. ``heads`` are those owned, ``rows`` their
    rows in streams of ``length``, ``met_rows`` and ``met_length`` those of the other axis. LSE and
    DELTA are float32 [B, query_heads, Tq]; ``group`` the query heads of a key head. RANGES and WORK
    describe the owned rows. ``scale`` is log2(e) / sqrt(D) and ``inv_sqrt`` 1 / sqrt(D).
    """
    dtype: gl.constexpr = own1.dtype
    rank, pair = place(gl.program_id(0), ranks, pairs, section)
    head = pair % heads
    batch = pair // heads
    own_tiles1 = gl.allocate_shared_memory(dtype, [2, 1, 1, 1, BM, D], own1.layout)
    own_tiles2 = gl.allocate_shared_memory(dtype, [2, 1, 1, 1, BM, D], own2.layout)
    ring1 = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 1, BN, D], met1.layout)
    ring2 = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 1, BN, D], met2.layout)
    own_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(own_full.index(j), count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(free.index(j), count=2)
    fence_async_shared()
    bars = (own_full, full, free)
    if OWN_QUERIES:
        met_head = head // group
        met_heads = 1
        query_head = head
        query_rows = rows
    else:
        met_head = head * group
        met_heads = group
        query_head = met_head
        query_rows = met_rows
    offset = batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    OUT1 += offset
    OUT2 += offset
    offset = (batch.to(gl.int64) * query_heads + query_head) * query_rows
    LSE += offset
    DELTA += offset
    RANGES += batch.to(gl.int64) * stride_rb
    WORK += batch.to(gl.int64) * stride_wb + rank * 20
    gl.warp_specialize([
        (gradient_consumer, (
            OUT1, OUT2, LSE, DELTA, RANGES, WORK, scale, inv_sqrt, own_tiles1, own_tiles2, ring1,
            ring2, bars, met_heads, rows, length, met_rows, met_length, clean_stream, stride_ot,
            0, OWN_QUERIES, BM, BN, D, STAGES, dtype)),
        (gradient_consumer, (
            OUT1, OUT2, LSE, DELTA, RANGES, WORK, scale, inv_sqrt, own_tiles1, own_tiles2, ring1,
            ring2, bars, met_heads, rows, length, met_rows, met_length, clean_stream, stride_ot,
            1, OWN_QUERIES, BM, BN, D, STAGES, dtype)),
        (gradient_loader, (
            own1, own2, met1, met2, WORK, own_tiles1, own_tiles2, ring1, ring2, bars,
            batch, head, met_head, met_heads, clean_stream, BM, BN, D, STAGES)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
