"""Buffers, grids and arguments of the kernels. The only module that imports Triton's kernels.

Shapes: B batch, H query heads, Hkv key heads, Tq queries, Tk keys, L positions of a stream,
D head width.
"""

# Triton's language is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from bd3lm.model.attention.triton import backward, decode, forward
from bd3lm.model.attention.triton.tuning import Kernel, Tiles, architecture, tiles

LOG2E = 1.4426950408889634
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Small, so that a test of a few dozen positions meets empty, full and partial tiles.
INTERPRETED_TILES = Tiles(32, 16, 4, 1)


P = ParamSpec("P")
R = TypeVar("R")


def on_device_of_first(run: Callable[P, R]) -> Callable[P, R]:
    """Launch on the device of the first tensor; Triton takes the current one, which may differ."""

    @wraps(run)
    def launched(*args: P.args, **options: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if INTERPRETED:
            return run(*args, **options)
        with torch.cuda.device(first.device):
            return run(*args, **options)

    return launched


def padded(width: int) -> int:
    """Columns of a tile that holds ``width``: a power of two, at least 16 for a product."""
    return max(16, triton.next_power_of_2(width))


def choose(kernel: Kernel, x: Tensor) -> Tiles:
    """Tile sizes for the device, head width and dtype of ``x``."""
    if INTERPRETED:
        return INTERPRETED_TILES
    arch = architecture(torch.cuda.get_device_capability(x.device))
    return tiles(kernel, arch, x.shape[-1], x.dtype == torch.float32)


def laid_out(x: Tensor) -> Tensor:
    """``x``, or a copy whose rows are contiguous and begin where wide loads may (16 bytes).

    Triton would compile other code for other alignments, and only this one was checked.
    """
    wide = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:-1])
    if x.stride(-1) == 1 and (wide or INTERPRETED):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def strides(*xs: Tensor) -> list[int]:
    """Batch, head and row strides of each tensor."""
    return [x.stride(i) for x in xs for i in range(3)]


def section(x: Tensor, pairs: int, rows: int) -> int:
    """Number of pairs of batch row and head that run together (``common.place``).

    Args:
        x: on the device, [..., D].
        pairs: all of them.
        rows: rows of two matrices that the tiles of one pair share.
    """
    if INTERPRETED:
        return min(2, pairs)
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    # Half of it, because outputs and other kernels pass through the cache, too.
    return max(1, min(pairs, cache // 2 // (2 * rows * x.shape[-1] * x.element_size())))


def batch_stride(ranges: Tensor) -> int:
    """Elements between the ranges of two rows of the batch; 0 where they are shared."""
    return 0 if ranges.shape[0] == 1 else ranges.stride(0)


def empty_rows(x: Tensor) -> Tensor:
    """An uninitialised [B, H, T, D] as ``x``, with the heads of a position side by side."""
    batch, heads, rows, width = x.shape
    return x.new_empty(batch, rows, heads, width).transpose(1, 2)


@on_device_of_first
def run_forward(
    q: Tensor, k: Tensor, v: Tensor, key_ranges: Tensor, noised: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Tq, D] and log2-sum-exp float32 [B, H, Tq]."""
    q, k, v = laid_out(q), laid_out(k), laid_out(v)
    batch, heads, queries, width = q.shape
    group = heads // k.shape[1]
    pairs = batch * heads
    length = k.shape[2] // (2 if noised else 1)
    per_stream = length if noised else queries
    out = empty_rows(q)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    tile = choose("forward", q)
    programs = queries // per_stream * triton.cdiv(per_stream, tile.block_m)
    forward.forward_kernel[(programs * pairs,)](
        q, k, v, out, lse, key_ranges,
        scale * LOG2E, pairs, section(k, pairs, triton.cdiv(k.shape[2], group)), heads, group,
        queries, per_stream, length, length if noised else 0,
        *strides(q, k, v, out), batch_stride(key_ranges),
        D=width, DP=padded(width), BM=tile.block_m, BN=tile.block_n, INTERPRET=INTERPRETED,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, lse


def run_delta(out: Tensor, dout: Tensor) -> Tensor:
    """Sum of out * dout over D, float32 [B, H, Tq]; both as :func:`laid_out` gives them."""
    batch, heads, queries, width = out.shape
    delta = out.new_empty(batch, heads, queries, dtype=torch.float32)
    backward.delta_kernel[(batch * heads, triton.cdiv(queries, 64))](
        out, dout, delta, heads, queries, *strides(out, dout), BM=64, D=width, DP=padded(width)
    )
    return delta


@on_device_of_first
def run_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    key_ranges: Tensor, query_ranges: Tensor, noised: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, shaped as they are."""
    dout, q, k, v = laid_out(dout), laid_out(q), laid_out(k), laid_out(v)
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    length = keys // (2 if noised else 1)
    per_stream = length if noised else queries
    offset = length if noised else 0
    group = heads // kv_heads
    shape = {"D": width, "DP": padded(width)}

    delta = run_delta(out, dout)
    dk, dv = empty_rows(k), empty_rows(v)
    tile = choose("keys", q)
    programs = keys // length * triton.cdiv(length, tile.block_n)
    pairs = batch * kv_heads
    backward.key_kernel[(programs * pairs,)](
        q, k, v, dout, lse, delta, dk, dv, query_ranges,
        scale * LOG2E, scale, pairs, section(q, pairs, group * queries), kv_heads, group,
        queries, per_stream, keys, length, offset,
        *strides(q, k, v, dout, dk, dv), batch_stride(query_ranges),
        BM=tile.block_m, BN=tile.block_n, INTERPRET=INTERPRETED,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **shape,
    )  # fmt: skip
    dq = empty_rows(q)
    tile = choose("queries", q)
    programs = queries // per_stream * triton.cdiv(per_stream, tile.block_m)
    pairs = batch * heads
    backward.query_kernel[(programs * pairs,)](
        q, k, v, dout, lse, delta, dq, key_ranges,
        scale * LOG2E, scale, pairs, section(k, pairs, triton.cdiv(keys, group)), heads, group,
        queries, per_stream, length, offset,
        *strides(q, k, v, dout, dq), batch_stride(key_ranges),
        BM=tile.block_m, BN=tile.block_n, INTERPRET=INTERPRETED,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **shape,
    )  # fmt: skip
    return dq, dk, dv


@on_device_of_first
def run_decode(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None, lo: Tensor, hi: Tensor,
    scale: float, chunks: int,
) -> Tensor:  # fmt: skip
    """Output [B, H, Tq, D] over a cache; ``chunks`` of 0 fills the device."""
    q, k, v = laid_out(q), laid_out(k), laid_out(v)
    batch, heads, queries, width = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    tile = choose("decode", q)
    row_tiles = triton.cdiv(group * queries, tile.block_m)
    capacity = k.shape[2] * (1 if pages is None else pages.shape[1])
    chunks = chunks or count_chunks(
        multiprocessors(q), row_tiles * batch * kv_heads, triton.cdiv(capacity, tile.block_n)
    )
    rows = batch * heads * queries
    part = q.new_empty(chunks, rows, width, dtype=torch.float32)
    part_lse = q.new_empty(chunks, rows, dtype=torch.float32)
    shape = {"D": width, "DP": padded(width), "INTERPRET": INTERPRETED}
    decode.decode_kernel[(row_tiles * batch * kv_heads, chunks)](
        q, k, v, lo if pages is None else pages, lo, hi, part, part_lse,
        scale * LOG2E, kv_heads, group, queries, chunks, 0 if pages is None else pages.shape[1],
        *strides(q, k, v), batch_stride(lo),
        BM=tile.block_m, BN=tile.block_n, PAGE=0 if pages is None else k.shape[2],
        num_warps=tile.num_warps, num_stages=tile.num_stages, **shape,
    )  # fmt: skip
    out = empty_rows(q)
    decode.combine_kernel[(rows,)](
        part, part_lse, out, heads, queries, chunks, rows, *strides(out),
        CP=triton.next_power_of_2(chunks), num_warps=4, **shape,
    )  # fmt: skip
    return out


def count_chunks(multiprocessors: int, programs: int, key_tiles: int) -> int:
    """Chunks that give every multiprocessor two programs, each with at least four tiles of keys."""
    return max(1, min(triton.cdiv(2 * multiprocessors, programs), key_tiles // 4, 64))


def multiprocessors(x: Tensor) -> int:
    """Number of multiprocessors of the GPU that holds ``x``."""
    if INTERPRETED:
        return 4
    return torch.cuda.get_device_properties(x.device).multi_processor_count
