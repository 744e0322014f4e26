"""Parts that the Hopper kernels share: the worklist as they read it, rings of buffers, stores.

A ring has ``STAGES`` buffers of shared memory, each with two mbarriers. The loader waits on
``free``, where both consumers arrive when they have read the buffer, and fills it by TMA, which
completes ``full``. Every filling is waited for and freed by both consumers, also by one that needs
none of it: so phases never mix, and a program does not end while a copy is under way.
"""

# Gluon is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportMissingImports=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# ruff: noqa: ANN001, ANN201, N803, N806  (Gluon gives arguments their types; capitals are pointers)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Its name since Triton 3.8, and the one before.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def place(program, ranks, pairs, section):
    """Work of a program: (entry of the worklist, pair of row and head), as in ``triton.common``."""
    first = program // (ranks * section) * section
    width = gl.minimum(section, pairs - first)
    left = program - first * ranks
    return left // width, first + left % width


@gluon.jit
def work_of_program(WORK):
    """First clean tile met, number of clean steps, first noised tile, number of steps."""
    return gl.load(WORK), gl.load(WORK + 1), gl.load(WORK + 2), gl.load(WORK + 3)


@gluon.jit
def work_of_tile(WORK, g: gl.constexpr):
    """Owned tile ``g``: (stream, first row), (begin, end), and bounds of its full steps."""
    ENTRY: gl.constexpr = 4 + 8 * g
    rows = (gl.load(WORK + ENTRY), gl.load(WORK + ENTRY + 1))
    part = (gl.load(WORK + ENTRY + 2), gl.load(WORK + ENTRY + 3))
    clean = (gl.load(WORK + ENTRY + 4), gl.load(WORK + ENTRY + 5))
    noised = (gl.load(WORK + ENTRY + 6), gl.load(WORK + ENTRY + 7))
    return rows, part, (clean, noised)


@gluon.jit
def tile_of_step(t, work):
    """The tile met in step ``t``, and whether it is noised."""
    clean_first, clean_steps, noised_first, _ = work
    noised = t >= clean_steps
    return gl.where(noised, noised_first + t - clean_steps, clean_first + t), noised


@gluon.jit
def is_full(t, full):
    """Return whether step ``t`` needs no mask."""
    clean, noised = full
    return ((t >= clean[0]) & (t < clean[1])) | ((t >= noised[0]) & (t < noised[1]))


@gluon.jit
def load_bounds(RANGES, rows, row):
    """The ranges of some rows, from int32 [4, rows]: clean lo, hi and noised lo, hi."""
    c_lo = gl.load(RANGES + row)
    c_hi = gl.load(RANGES + rows + row)
    n_lo = gl.load(RANGES + 2 * rows + row)
    n_hi = gl.load(RANGES + 3 * rows + row)
    return c_lo, c_hi, n_lo, n_hi


@gluon.jit
def is_seen(met, noised, bounds):
    """Which pairs of a tile attend [BM, BN]; ``met`` are positions [BN] of a stream."""
    c_lo, c_hi, n_lo, n_hi = bounds
    lo = gl.where(noised, n_lo, c_lo)
    hi = gl.where(noised, n_hi, c_hi)
    return (met[None, :] >= lo[:, None]) & (met[None, :] < hi[:, None])


@gluon.jit
def pass_over(n, full, free, STAGES: gl.constexpr):
    """Free the n-th filling of a ring, which the rows of a consumer do not need."""
    stage = n % STAGES
    mbarrier.wait(full.index(stage), (n // STAGES) & 1)
    mbarrier.arrive(free.index(stage), count=1)


@gluon.jit
def store_tile(
    OUT, x, stream, start, length, stride_t, BM: gl.constexpr, D: gl.constexpr, dtype: gl.constexpr
):
    """Write a tile [BM, D] of rows ``start`` on, without those past the end of the stream."""
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    x = gl.convert_layout(x.to(dtype), STORE)
    row = gl.arange(0, BM, gl.SliceLayout(1, STORE))
    col = gl.arange(0, D, gl.SliceLayout(0, STORE))
    base = OUT + (stream * length + start).to(gl.int64) * stride_t
    inside = start + row < length
    gl.store(base + row[:, None] * stride_t + col[None, :], x, mask=inside[:, None])
