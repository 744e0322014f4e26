"""Buffers, descriptors and arguments of the Hopper kernel. The only module that imports it.

Shapes: B batch, H query heads, Hkv key heads, Tq queries, Tk keys, D head width.
"""

# Gluon is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportMissingImports=false
from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bd3lm.model.attention.hopper import forward
from bd3lm.model.attention.hopper.worklist import KEYS, QUERIES
from bd3lm.model.attention.triton.launch import (
    LOG2E,
    batch_stride,
    empty_rows,
    laid_out,
    on_device_of_first,
    section,
)

STAGES = {64: 4, 128: 3}
"""Buffers of each ring, by head width."""
REGISTERS = 240
"""Registers a thread of the consumers: what 24 for the loader leaves of :data:`MAX_REGISTERS`."""
MAX_REGISTERS = 168
"""Registers a thread at the launch: three warpgroups then fill a multiprocessor."""


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


def spread_out(x: Tensor) -> Tensor:
    """``x`` laid out as wide loads want it, and no row at the address of another."""
    x = laid_out(x)
    if any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True)):
        return x.clone(memory_format=torch.contiguous_format)
    return x


@on_device_of_first
def run_forward(
    q: Tensor, k: Tensor, v: Tensor, key_ranges: Tensor, work: Tensor, noised: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Tq, D] and log2-sum-exp float32 [B, H, Tq]."""
    q, k, v = spread_out(q), spread_out(k), spread_out(v)
    batch, heads, queries, width = q.shape
    group = heads // k.shape[1]
    pairs, ranks = batch * heads, work.shape[1]
    key_streams = 2 if noised else 1
    query_streams = 2 if queries == k.shape[2] and noised else 1
    out = empty_rows(q)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    forward.forward_kernel[(ranks * pairs,)](
        descriptor(q, query_streams, QUERIES),
        descriptor(k, key_streams, KEYS), descriptor(v, key_streams, KEYS),
        out, lse, key_ranges, work,
        scale * LOG2E, pairs, section(k, pairs, -(-k.shape[2] // group)), ranks, heads, group,
        queries, queries // query_streams, key_streams - 1,
        *(out.stride(i) for i in range(3)), batch_stride(key_ranges), batch_stride(work),
        BM=QUERIES, BN=KEYS, D=width, STAGES=STAGES[width], REGISTERS=REGISTERS,
        num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return out, lse
