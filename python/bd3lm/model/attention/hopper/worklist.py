"""Work of every block of the Hopper kernel: its two tiles of queries and the keys they see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3lm.model.attention.mask import BlockMask
from bd3lm.model.attention.mask_cache import cached_per_mask
from bd3lm.model.attention.triton.ranges import ranges

QUERIES = 64
"""Queries of a tile: one warpgroup's."""
KEYS = 64
"""Keys of a tile."""


def query_streams(mask: BlockMask) -> int:
    """Streams that the queries of a mask come from."""
    return 2 if mask.noised and mask.clean_queries else 1


def pairs_streams(mask: BlockMask) -> bool:
    """Return whether a block takes the same positions of xt and of x0.

    Both see the same clean keys, up to their own block of the mask. If that fits into a tile, two
    tiles of xt and of x0 need one step less than those of neighbouring positions would.
    """
    return query_streams(mask) == 2 and mask.block_size <= KEYS


@cached_per_mask
def worklist(mask: BlockMask, device: str) -> Tensor:
    """One entry for each block, in the order in which they start: most steps first.

    A step is a tile of keys that the block loads, for both of its tiles of queries: clean ones,
    then noised ones, each in order. A tile of queries takes part in the steps from ``begin`` to
    ``end``, and needs no mask in those from ``full`` to ``full_end``.

    Returns:
        int32 [B or 1, blocks, 20]: first clean tile of keys, number of clean steps, first noised
        tile, number of steps; then for each tile of queries stream, first row, begin, end, and
        full and full_end of the clean and of the noised steps.
    """
    keys, _ = ranges(mask, device)
    streams = query_streams(mask)
    rows = keys.unflatten(2, (streams, -1))  # [B, 4, streams, length]
    missing = -rows.shape[3] % QUERIES
    rows = torch.cat([rows, rows[..., -1:].expand(-1, -1, -1, missing)], dim=3)
    rows = rows.unflatten(3, (-1, QUERIES))  # [B, 4, streams, tiles, QUERIES]
    spans = torch.stack([*_tiles_met(rows[:, 0], rows[:, 1]), *_tiles_met(rows[:, 2], rows[:, 3])])
    tiles = spans.shape[3]
    if pairs_streams(mask):
        spans = spans.movedim(2, 3)
        tile = torch.arange(tiles, device=device)[:, None].expand(-1, 2)
        stream = torch.arange(2, device=device).expand(tiles, -1)
    else:
        halves = (tiles + 1) // 2
        spans = F.pad(spans, (0, tiles % 2)).unflatten(3, (halves, 2)).flatten(2, 3)
        tile = torch.arange(2 * halves, device=device).view(halves, 2).repeat(streams, 1)
        stream = torch.arange(streams, device=device).repeat_interleave(halves)
        stream = stream[:, None].expand(-1, 2)
    return _entries(spans, stream, tile * QUERIES)


def _tiles_met(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles of keys that rows [..., QUERIES] meet, as ``tile_span`` of ``triton.common``.

    Returns:
        first, last, full_first and full_last, int32 [...]: tiles [first, last) are met, and of
        these [full_first, full_last) by every row in all of their keys.
    """
    seen = hi > lo
    end = torch.where(seen, hi, 0).amax(-1)
    start = torch.where(seen, lo, end[..., None]).amin(-1)
    first, last = start // KEYS, (end + KEYS - 1) // KEYS
    full_first = ((lo.amax(-1) + KEYS - 1) // KEYS).maximum(first).minimum(last)
    full_last = (hi.amin(-1) // KEYS).maximum(full_first).minimum(last)
    return first, last, full_first, full_last


def _entries(spans: Tensor, stream: Tensor, start: Tensor) -> Tensor:
    """The worklist of pairs of tiles of queries.

    Args:
        spans: int32 [8, B, blocks, 2], the tiles of clean and noised keys met.
        stream: [blocks, 2].
        start: [blocks, 2], first row of each tile of queries.
    """
    firsts, counts = [], []
    for first, last in ((spans[0], spans[1]), (spans[4], spans[5])):
        low = torch.where(last > first, first, 1 << 30).amin(-1)
        high = torch.where(last > first, last, 0).amax(-1)
        counts.append((high - low).clamp(min=0))
        firsts.append(torch.where(counts[-1] > 0, low, 0))
    steps = counts[0] + counts[1]
    # From tiles of keys to steps.
    clean = spans[:4] - firsts[0][..., None]
    noised = spans[4:] + (counts[0] - firsts[1])[..., None]
    begins, ends = [], []
    for part in (clean, noised):
        met = part[1] > part[0]
        begins.append(torch.where(met, part[0], 1 << 30))
        ends.append(torch.where(met, part[1], 0))
    end = ends[0].maximum(ends[1])
    begin = begins[0].minimum(begins[1]).minimum(end)
    own = [stream.expand_as(end), start.expand_as(end), begin, end, *clean[2:], *noised[2:]]
    columns = [firsts[0], counts[0], firsts[1], steps]
    columns += [column[..., g] for g in range(2) for column in own]
    entries = torch.stack(columns, dim=-1).int()
    order = steps.argsort(dim=-1, descending=True, stable=True)
    return entries.gather(1, order[..., None].expand_as(entries)).contiguous()
