"""Buffers, descriptors and arguments of the Hopper kernels. The only module that imports them.

Shapes: B batch, H query heads, Hkv key heads, Tq queries, Tk keys, D head width.
"""

# Gluon is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportMissingImports=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bd3lm.model.attention.hopper import backward, forward
from bd3lm.model.attention.hopper.worklist import ROWS, WIDE, queries_met
from bd3lm.model.attention.triton.launch import (
    LOG2E,
    batch_stride,
    empty_rows,
    laid_out,
    on_device_of_first,
    run_delta,
    section,
)


class Shape(NamedTuple):
    """Tiles of one kernel; a warpgroup owns :data:`~.worklist.ROWS`."""

    met: int
    """Rows of a tile that is met."""
    stages: int
    """Buffers of each ring."""


SHAPES = {
    ("forward", 64): Shape(WIDE, 4),
    ("forward", 128): Shape(WIDE, 3),
    ("queries", 64): Shape(WIDE, 3),
    ("queries", 128): Shape(WIDE, 3),
    ("keys", 64): Shape(queries_met(64), 3),
    ("keys", 128): Shape(queries_met(128), 4),
}
"""By kernel and head width; all compile without spills, and none has been timed."""
REGISTERS = 240
"""Registers a thread of the consumers: what 24 for the loader leaves of :data:`MAX_REGISTERS`."""
MAX_REGISTERS = 168
"""Registers a thread at the launch: three warpgroups then fill a multiprocessor."""
OPTIONS = {"REGISTERS": REGISTERS, "num_warps": 4, "maxnreg": MAX_REGISTERS}


def descriptor(x: Tensor, streams: int, rows: int) -> TensorDescriptor:
    """TMA descriptor of ``x`` [B, heads, streams * L, D] in tiles of ``rows``.

    Streams are an axis of their own, so rows past the end of one are read as zeros.
    """
    batch, heads, total, width = x.shape
    length = total // streams
    shape = [batch, heads, streams, length, width]
    strides = [x.stride(0), x.stride(1), length * x.stride(2), x.stride(2), 1]
    # The stride of an axis of one element is never used, but has to be a valid one.
    strides = [width if n == 1 else s for n, s in zip(shape[:4], strides[:4], strict=True)] + [1]
    kind = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    block = [1, 1, 1, rows, width]
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return TensorDescriptor(x, shape, strides, block, layout)


def streams(q: Tensor, k: Tensor, noised: bool) -> tuple[int, int]:
    """Streams of the queries and of the keys: [xt ; x0] or one of them."""
    keys = 2 if noised else 1
    return (2 if noised and q.shape[2] == k.shape[2] else 1), keys


def spread_out(x: Tensor) -> Tensor:
    """``x`` laid out as wide loads want it, and no row at the address of another."""
    x = laid_out(x)
    if any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True)):
        return x.clone(memory_format=torch.contiguous_format)
    return x


@on_device_of_first
def run_forward(
    q: Tensor, k: Tensor, v: Tensor, key_ranges: Tensor, query_work: Tensor, noised: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, H, Tq, D] and log2-sum-exp float32 [B, H, Tq]."""
    q, k, v = spread_out(q), spread_out(k), spread_out(v)
    batch, heads, queries, width = q.shape
    group = heads // k.shape[1]
    pairs, ranks = batch * heads, query_work.shape[1]
    query_streams, key_streams = streams(q, k, noised)
    met, stages = SHAPES["forward", width]
    out = empty_rows(q)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    forward.forward_kernel[(ranks * pairs,)](
        descriptor(q, query_streams, ROWS),
        descriptor(k, key_streams, met), descriptor(v, key_streams, met),
        out, lse, key_ranges, query_work,
        scale * LOG2E, pairs, section(k, pairs, -(-k.shape[2] // group)), ranks, heads, group,
        queries, queries // query_streams, key_streams - 1,
        *(out.stride(i) for i in range(3)), batch_stride(key_ranges), batch_stride(query_work),
        BM=ROWS, BN=met, D=width, STAGES=stages, **OPTIONS,
    )  # fmt: skip
    return out, lse


@on_device_of_first
def run_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    key_ranges: Tensor, query_ranges: Tensor, query_work: Tensor, key_work: Tensor,
    noised: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, shaped as they are."""
    dout, q, k, v = spread_out(dout), spread_out(q), spread_out(k), spread_out(v)
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    query_streams, key_streams = streams(q, k, noised)
    delta = run_delta(out, dout)
    dq, dk, dv = empty_rows(q), empty_rows(k), empty_rows(v)

    def launch(
        kernel: str, owned: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor],
        outputs: tuple[Tensor, Tensor], bounds: Tensor, work: Tensor, size: int,
    ) -> None:  # fmt: skip
        own_streams, met_streams = query_streams, key_streams
        if kernel == "keys":
            own_streams, met_streams = met_streams, own_streams
        rows, met_rows = owned[0].shape[2], others[0].shape[2]
        met, stages = SHAPES[kernel, width]
        pairs, ranks = batch * owned[0].shape[1], work.shape[1]
        backward.gradient_kernel[(ranks * pairs,)](
            *(descriptor(x, own_streams, ROWS) for x in owned),
            *(descriptor(x, met_streams, met) for x in others),
            *outputs, lse, delta, bounds, work,
            scale * LOG2E, scale, pairs, section(q, pairs, size), ranks, owned[0].shape[1], group,
            heads, rows, rows // own_streams, met_rows, met_rows // met_streams, met_streams - 1,
            *(outputs[0].stride(i) for i in range(3)), batch_stride(bounds), batch_stride(work),
            OWN_QUERIES=kernel == "queries", BM=ROWS, BN=met, D=width, STAGES=stages, **OPTIONS,
        )  # fmt: skip

    launch("keys", (k, v), (q, dout), (dk, dv), query_ranges, key_work, group * queries)
    launch("queries", (q, dout), (k, v), (dq, dq), key_ranges, query_work, -(-keys // group))
    return dq, dk, dv
