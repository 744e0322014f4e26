"""The kernels' roofline on paper: operations, bytes and tiles, and their bounds.

Peaks are NVIDIA's data sheets'. Nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3lm.model.attention.mask import BlockMask
from bd3lm.model.attention.triton.ranges import ranges
from bd3lm.model.attention.triton.tuning import Kernel, tiles


@dataclass(frozen=True)
class Part:
    """One GPU."""

    name: str
    arch: str
    tensor: float
    """Dense bf16 operations a second."""
    bytes: float
    """Bytes of memory a second."""
    exponentials: float
    """16 a clock and multiprocessor."""
    lanes: float
    """float32 instructions a second, a multiply-add counting once."""


A100 = Part("A100 SXM 80 GB", "sm_80", 312e12, 2.04e12, 16 * 108 * 1.41e9, 64 * 108 * 1.41e9)
H100 = Part("H100 SXM", "sm_90", 989e12, 3.35e12, 16 * 132 * 1.83e9, 128 * 132 * 1.83e9)

# Per score: multiply-adds in units of D (two operations each), and float32 instructions
# without the exponential: forward scale-subtract, max, sum, half a conversion, rescaling; backward
# scale-subtract, subtract delta, multiply, and a half or a whole conversion.
PRODUCTS: dict[str, int] = {"forward": 2, "keys": 4, "queries": 3}
INSTRUCTIONS: dict[str, float] = {"forward": 4.0, "keys": 4.0, "queries": 3.5}


def pairs(mask: BlockMask) -> int:
    """Query-key pairs that attend."""
    intervals = mask.intervals()
    clean = intervals.clean_hi.long() - intervals.clean_lo
    return int((clean + intervals.noised_hi - intervals.noised_lo).sum())


def tile_work(tile: Tensor, other: int) -> tuple[int, int]:
    """Full and partial tiles that one tile of rows meets, by the rule of ``tile_span``.

    Args:
        tile: its ranges, int32 [4, rows].
        other: columns of a tile.
    """
    full = partial = 0
    for lo, hi in (tile[:2], tile[2:]):
        seen = hi > lo
        if not seen.any():
            continue
        first, last = int(lo[seen].min()) // other, -(-int(hi[seen].max()) // other)
        inside = max(0, int(hi.min()) // other - max(-(-int(lo.max()) // other), first))
        full += inside
        partial += last - first - inside
    return full, partial


def visited(rows: Tensor, per_stream: int, own: int, other: int) -> tuple[int, int]:
    """Full and partial tiles that a kernel visits.

    Args:
        rows: int32 [1, 4, T], as :func:`bd3lm.model.attention.triton.ranges.ranges` gives.
        per_stream: rows of a stream; tiles do not straddle two.
        own: rows of a tile.
        other: columns of a tile.
    """
    tiles = [
        tile_work(tile, other)
        for stream in rows[0].split(per_stream, dim=1)
        for tile in stream.split(own, dim=1)
    ]
    return sum(full for full, _ in tiles), sum(partial for _, partial in tiles)


def row(kernel: Kernel, part: Part, mask: BlockMask, width: int) -> str:
    """One line of the table, for one head of one row of the batch."""
    form = "[xt ; x0]" if mask.noised else "x0 alone"
    launch = tiles(kernel, part.arch, width, wide=False)
    keys, queries = ranges(mask, "cpu")
    own, other = launch.block_m, launch.block_n
    if kernel == "keys":
        own, other = other, own
    full, partial = visited(queries if kernel == "keys" else keys, mask.seq_len, own, other)
    work = (full + partial) * own * other
    live = pairs(mask)
    dense = mask.num_queries * mask.num_keys
    operations = 2 * width * PRODUCTS[kernel]
    # Once each: q, out, lse and k, v; backward q, dout, lse, delta and k, v, and the gradients.
    per_query, per_key, sums = {"forward": (2, 2, 1), "keys": (2, 4, 2), "queries": (3, 2, 2)}[
        kernel
    ]
    columns = per_query * mask.num_queries + per_key * mask.num_keys
    traffic = 2 * width * columns + 4 * sums * mask.num_queries
    # Tiles are as wide as the next power of two, and multiply its zero columns, too.
    wide = max(16, 1 << (width - 1).bit_length())
    matmul = work * operations * wide / width / part.tensor
    exponential = work / part.exponentials
    lanes = work * INSTRUCTIONS[kernel] / part.lanes
    memory = traffic / part.bytes
    useful = live * operations / part.tensor
    overlapped = useful / max(matmul, exponential, lanes, memory)
    serial = useful / max(matmul + exponential + lanes, memory)
    names = {"tensor cores": matmul, "exponentials": exponential, "float32 lanes": lanes}
    names["memory"] = memory
    return (
        f"| {kernel} | {form} | {part.name} | {width} | {mask.seq_len} | {mask.block_size} "
        f"| {live * operations / 1e9:.2f} | {traffic / 1e6:.2f} "
        f"| {live / dense:.3f} | {work / dense:.3f} | {full} + {partial} "
        f"| {100 * serial:.0f}–{100 * overlapped:.0f}% | {max(names, key=names.__getitem__)} |"
    )


def streamed_row(
    name: str, part: Part, width: int, length: int, operations: float, traffic: float
) -> str:
    """A kernel that reads everything once and does little with it: memory bounds it."""
    bound = operations / traffic * part.bytes / part.tensor
    return (
        f"| {name} | – | {part.name} | {width} | {length} | – | {operations / 1e9:.4f} "
        f"| {traffic / 1e6:.2f} | 1 | 1 | – | at most {100 * bound:.2g}% | memory |"
    )


def streamed(part: Part, width: int, length: int) -> list[str]:
    """Delta of a training step; decoding, where ``rows`` queries share a cache; its combination."""
    rows = 2 * length
    delta = streamed_row("delta", part, width, length, 2 * rows * width, rows * (4 * width + 4))
    lines = [delta]
    for rows in (4, 16, 64):
        name, operations = f"decode, {rows} rows", 4 * length * width * rows
        lines.append(streamed_row(name, part, width, length, operations, 4 * length * width))
    rows, chunks = 16, 32
    operations = 2 * chunks * rows * width
    traffic = rows * (chunks * (4 * width + 4) + 2 * width)
    name = f"combine, {rows} rows, {chunks} chunks"
    return [*lines, streamed_row(name, part, width, length, operations, traffic)]


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| kernel | streams | part | D | L | S | GFLOP | MB | live pairs | visited "
        "| tiles, full + partial | expected | bound by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    kernels: tuple[Kernel, ...] = ("forward", "keys", "queries")
    for kernel in kernels:
        for part in (A100, H100):
            for width, length, block in (
                (64, 1024, 4),
                (64, 1024, 64),
                (64, 8192, 16),
                (128, 8192, 16),
                (80, 8192, 16),
            ):
                lines.append(row(kernel, part, BlockMask.training(length, block), width))
            lines.append(row(kernel, part, BlockMask.clean(8192, 16), 64))
            lines.append(row(kernel, part, BlockMask.clean(8192, 1), 64))
    for part in (A100, H100):
        lines += streamed(part, 64, 8192)
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
