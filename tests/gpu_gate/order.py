"""The order in which programs are launched, as the kernels work it out; run by ``interpret.py``."""

# Triton's language is not typed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import torch
import triton
import triton.language as tl
from roofline import tile_work
from torch import Tensor

from bd3lm.model.attention.mask import BlockMask
from bd3lm.model.attention.triton.ranges import ranges

OWN, OTHER = 32, 16
MASKS = (
    BlockMask.training(200, 4),
    BlockMask.training(128, 32),
    BlockMask.denoise(150, 16),
    BlockMask.clean(190, 1),
    BlockMask.clean(96, 8),
)


@triton.jit
def order_kernel(OUT, tiles, streams, pairs, section, PLACE: tl.constexpr, ORDER: tl.constexpr):
    """Write (stream, tile, pair) of every program."""
    program = tl.program_id(0)
    rank, pair = PLACE(program, tiles * streams, pairs, section)
    stream, tile = ORDER(rank, tiles, streams)
    tl.store(OUT + 3 * program, stream)
    tl.store(OUT + 3 * program + 1, tile)
    tl.store(OUT + 3 * program + 2, pair)


def flaw(common: ModuleType) -> float:
    """Zero where every tile of every pair is launched once and the heavy ones first, else inf.

    A tile of the other stream may be heavier than its forerunner by its own block: one tile.
    """
    for mask in MASKS:
        keys, queries = ranges(mask, "cpu")
        for rows, order in ((keys, common.late_first), (queries, common.early_first)):
            for pairs, section in ((1, 1), (5, 2), (6, 3), (4, 4)):
                if not sound(common, rows, mask.seq_len, order, pairs, section):
                    return float("inf")
    return 0.0


def sound(
    common: ModuleType,
    rows: Tensor,
    per_stream: int,
    order: triton.JITFunction,
    pairs: int,
    section: int,
) -> bool:
    """Return whether one grid is a permutation, and its weights fall within each section."""
    streams, tiles = rows.shape[2] // per_stream, -(-per_stream // OWN)
    programs = streams * tiles * pairs
    out = torch.full((programs, 3), -1, dtype=torch.int32)
    order_kernel[(programs,)](out, tiles, streams, pairs, section, common.place, order)
    launched = [tuple(program) for program in out.tolist()]
    wanted = {(s, t, p) for s in range(streams) for t in range(tiles) for p in range(pairs)}
    if len(launched) != len(wanted) or set(launched) != wanted:
        return False
    weight = {
        (s, t): sum(tile_work(tile, OTHER))
        for s, stream in enumerate(rows[0].split(per_stream, dim=1))
        for t, tile in enumerate(stream.split(OWN, dim=1))
    }
    for first in range(0, pairs, section):
        run = [weight[s, t] for s, t, p in launched if first <= p < first + section]
        if any(later > earlier + 1 for earlier, later in pairwise(run)):
            return False
    return True
