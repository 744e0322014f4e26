"""Parts that all kernels share: products and rounding that the interpreter gets right, tile lists.

A *range* is half-open, ``[lo, hi)``, in positions of one stream. A tile of rows, each with its own
range, meets the other axis in three kinds of tiles: *empty* (no row has anything there: never
visited), *full* (every row sees all of it: no mask) and *partial* (masked element by element).
Each kernel walks the full tiles of both streams in one loop and the partial ones in another, so
there are two inlined loop bodies under any mask; more of them spill.
"""

# Triton's language is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportMissingImports=false
# ruff: noqa: ANN001, ANN201, N803  (Triton gives arguments their types; capitals are pointers)
from __future__ import annotations

import triton
import triton.language as tl

# Triton compiles an integer argument anew when it is 1 or a multiple of 16. For these it must not:
# another length needs no second compilation, and the code checked offline is the code that runs.
# Strides
# are specialized, since wide loads need their multiples of 16 (``launch.laid_out`` sees to it).
SIZES = (
    "pairs", "section", "heads", "group", "queries", "stream_queries", "keys", "stream_keys",
    "clean_offset", "stride_rb", "chunks", "page_width", "rows",
)  # fmt: skip


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """``a @ b + acc`` in float32; products of float32 inputs are not rounded to tf32.

    The interpreter multiplies the raw bits of bf16, so there the operands are widened first,
    which is exact.
    """
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """``x`` in ``dtype``, rounded to nearest even; the interpreter would truncate to bf16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def place(program, ranks, pairs, section):
    """Work of a program of a one-dimensional grid: (rank of its tile, pair of row and head).

    Rank 0 is the heaviest tile. Pairs go section by section, as many at a time as the L2 cache
    holds the keys of; within a section the tiles of one rank start before those of the next.
    """
    first = program // (ranks * section) * section
    width = tl.minimum(section, pairs - first)
    left = program - first * ranks
    return left // width, first + left % width


@triton.jit
def late_first(rank, tiles, streams):
    """(stream, tile) of a tile of queries: late ones see most keys, in either stream."""
    return rank % streams, tiles - 1 - rank // streams


@triton.jit
def early_first(rank, tiles, streams):
    """(stream, tile) of a tile of keys: early clean ones are seen most, noised ones by a block."""
    return streams - 1 - rank // tiles, rank % tiles


@triton.jit
def own_tile(total, length, pairs, section, heads, QUERIES: tl.constexpr, T: tl.constexpr):
    """Tile of T rows that this program owns: (batch, head, start, row, row_ok).

    ``total`` rows are streams of ``length``. Rows ``start + row`` past the end of a stream repeat
    its last one, so loads need no mask and tile lists do not change; ``row_ok`` is false there.
    """
    tiles = tl.cdiv(length, T)
    streams = total // length
    rank, pair = place(tl.program_id(0), streams * tiles, pairs, section)
    if QUERIES:
        stream, tile = late_first(rank, tiles, streams)
    else:
        stream, tile = early_first(rank, tiles, streams)
    row = tl.arange(0, T)
    left = length - tile * T
    head = (pair % heads).to(tl.int64)
    batch = (pair // heads).to(tl.int64)
    return batch, head, stream * length + tile * T, tl.minimum(row, left - 1), row < left


@triton.jit
def rows_from(base, start, stride):
    """Address of row ``start``, in 64 bits: a row times a stride may overflow 32."""
    return base + start.to(tl.int64) * stride


@triton.jit
def load_rows(base, start, row, stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows ``start + row`` [T, DP] of a matrix [*, D], all in bounds; columns past D are zero."""
    col = tl.arange(0, DP)
    ptr = rows_from(base, start, stride) + row[:, None] * stride + col[None, :]
    if D == DP:
        return tl.load(ptr)
    return tl.load(ptr, mask=(col < D)[None, :], other=0.0)


@triton.jit
def load_rows_below(base, start, row, offset, stop, stride, D: tl.constexpr, DP: tl.constexpr):
    """Load rows ``offset + start + row`` like :func:`load_rows`, but zeros from row ``stop`` on."""
    col = tl.arange(0, DP)
    ptr = rows_from(base, offset + start, stride) + row[:, None] * stride + col[None, :]
    inside = (start + row < stop)[:, None]
    if D != DP:
        inside = inside & (col < D)[None, :]
    return tl.load(ptr, mask=inside, other=0.0)


@triton.jit
def store_rows(base, start, row, ok, stride, x, D: tl.constexpr, DP: tl.constexpr):
    """Write rows ``start + row`` [T, DP] where ``ok``, without the columns past D."""
    col = tl.arange(0, DP)
    inside = ok[:, None]
    if D != DP:
        inside = inside & (col < D)[None, :]
    ptr = rows_from(base, start, stride) + row[:, None] * stride + col[None, :]
    tl.store(ptr, x, mask=inside)


@triton.jit
def load_ranges(RANGES, batch, stride_batch, rows, index):
    """The ranges of some rows, from int32 [B or 1, 4, rows]: clean lo, hi and noised lo, hi."""
    base = RANGES + batch * stride_batch
    clean_lo = tl.load(base + index)
    clean_hi = tl.load(base + rows + index)
    noised_lo = tl.load(base + 2 * rows + index)
    noised_hi = tl.load(base + 3 * rows + index)
    return clean_lo, clean_hi, noised_lo, noised_hi


@triton.jit
def tile_span(lo, hi, TILE: tl.constexpr):
    """Tiles met by rows with ranges ``[lo, hi)``: (first, full_first, full_last, last).

    Partial tiles are [first, full_first) and [full_last, last), full ones
    [full_first, full_last); all are empty where every range is.
    """
    end = tl.max(tl.where(hi > lo, hi, 0), 0)
    start = tl.minimum(tl.min(tl.where(hi > lo, lo, end), 0), end)
    first = start // TILE
    last = (end + TILE - 1) // TILE
    full_first = (tl.max(lo, 0) + TILE - 1) // TILE
    full_first = tl.minimum(tl.maximum(full_first, first), last)
    full_last = tl.minimum(tl.maximum(tl.min(hi, 0) // TILE, full_first), last)
    return first, full_first, full_last, last


@triton.jit
def tiles_met(c_lo, c_hi, n_lo, n_hi, TILE: tl.constexpr):
    """Tiles met by rows with clean and noised ranges: (full, partial) lists.

    The last entry of either is its number of tiles; :func:`nth_full` and :func:`nth_partial` read
    the others.
    """
    c_first, c_full_first, c_full_last, c_last = tile_span(c_lo, c_hi, TILE)
    n_first, n_full_first, n_full_last, n_last = tile_span(n_lo, n_hi, TILE)
    c_full = c_full_last - c_full_first
    full = (c_full_first, c_full, n_full_first, c_full + n_full_last - n_full_first)
    c_head = c_full_first - c_first
    n_head = n_full_first - n_first
    c_count = c_head + c_last - c_full_last
    count = c_count + n_head + n_last - n_full_last
    partial = (c_first, c_head, c_full_last, c_count, n_first, n_head, n_full_last, count)
    return full, partial


@triton.jit
def nth_full(t, full):
    """The t-th full tile, clean ones first: (tile, whether it is noised)."""
    clean_first, clean_count, noised_first, _ = full
    noised = t >= clean_count
    return tl.where(noised, noised_first + t - clean_count, clean_first + t), noised


@triton.jit
def nth_partial(t, partial):
    """The t-th partial tile: clean before and after the full ones, then noised likewise."""
    c_first, c_head, c_full_last, c_count, n_first, n_head, n_full_last, _ = partial
    noised = t >= c_count
    t = tl.where(noised, t - c_count, t)
    head = tl.where(noised, n_head, c_head)
    first = tl.where(noised, n_first, c_first)
    after = tl.where(noised, n_full_last, c_full_last) - head
    return tl.where(t < head, first + t, after + t), noised
