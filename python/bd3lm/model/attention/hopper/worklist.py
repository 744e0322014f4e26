"""Work of every program of the Hopper kernels: two tiles that it owns, and the tiles they meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3lm.model.attention.mask import BlockMask
from bd3lm.model.attention.mask_cache import cached_per_mask
from bd3lm.model.attention.triton.ranges import ranges

ROWS = 64
"""Rows of a tile that a warpgroup owns."""
WIDE, NARROW = 64, 32
"""Rows of a tile that it meets: dK and dV of 128 features leave no registers for more than 32."""


def query_streams(mask: BlockMask) -> int:
    """Streams that the queries of a mask come from."""
    return 2 if mask.noised and mask.clean_queries else 1


def pairs_streams(mask: BlockMask) -> bool:
    """Return whether a program takes the same positions of xt and of x0.

    Both see the same clean keys, up to their own block. If a block fits into a tile, two
    tiles of xt and of x0 need one step less than those of neighbouring positions would.
    """
    return query_streams(mask) == 2 and mask.block_size <= WIDE


@cached_per_mask
def query_worklist(mask: BlockMask, device: str) -> Tensor:
    """Work of the programs that own queries; see :func:`_worklist`."""
    keys, _ = ranges(mask, device)
    return _worklist(keys, query_streams(mask), WIDE, pairs_streams(mask))


def key_worklist(mask: BlockMask, device: str, head: int) -> Tensor:
    """Work of the programs that own keys of ``head`` features; see :func:`_worklist`."""
    return (_meeting_wide if queries_met(head) == WIDE else _meeting_narrow)(mask, device)


def queries_met(head: int) -> int:
    """Rows of a tile of queries that keys of ``head`` features meet."""
    return WIDE if head <= 64 else NARROW


@cached_per_mask
def _meeting_wide(mask: BlockMask, device: str) -> Tensor:
    return _worklist(ranges(mask, device)[1], 2 if mask.noised else 1, WIDE, False)


@cached_per_mask
def _meeting_narrow(mask: BlockMask, device: str) -> Tensor:
    return _worklist(ranges(mask, device)[1], 2 if mask.noised else 1, NARROW, False)


def _worklist(bounds: Tensor, streams: int, width: int, paired: bool) -> Tensor:
    """One entry for each program, in the order in which they start: most steps first.

    A step is a tile of the other axis that the program loads, for both tiles that it owns: clean
    ones, then noised ones, each in order. An owned tile takes part in the steps from ``begin`` to
    ``end``, and needs no mask in those from ``full`` to ``full_end``.

    Args:
        bounds: int32 [B or 1, 4, rows], see ``ranges.py``.
        streams: how many the rows come from.
        width: rows of a tile that is met.
        paired: whether the two tiles of a program are the same positions of two streams, and not
            neighbours in one.

    Returns:
        int32 [B or 1, programs, 20]: first clean tile met, number of clean steps, first noised
        tile, number of steps; then for each owned tile stream, first row, begin, end, and full and
        full_end of the clean and of the noised steps.
    """
    device = bounds.device
    rows = bounds.unflatten(2, (streams, -1))  # [B, 4, streams, length]
    missing = -rows.shape[3] % ROWS
    rows = torch.cat([rows, rows[..., -1:].expand(-1, -1, -1, missing)], dim=3)
    rows = rows.unflatten(3, (-1, ROWS))  # [B, 4, streams, tiles, ROWS]
    met = [*_tiles_met(rows[:, 0], rows[:, 1], width), *_tiles_met(rows[:, 2], rows[:, 3], width)]
    spans = torch.stack(met)  # [8, B, streams, tiles]
    tiles = spans.shape[3]
    if paired:
        spans = spans.movedim(2, 3)
        tile = torch.arange(tiles, device=device)[:, None].expand(-1, 2)
        stream = torch.arange(2, device=device).expand(tiles, -1)
    else:
        halves = (tiles + 1) // 2
        spans = F.pad(spans, (0, tiles % 2)).unflatten(3, (halves, 2)).flatten(2, 3)
        tile = torch.arange(2 * halves, device=device).view(halves, 2).repeat(streams, 1)
        stream = torch.arange(streams, device=device).repeat_interleave(halves)
        stream = stream[:, None].expand(-1, 2)
    return _entries(spans, stream, tile * ROWS)


def _tiles_met(lo: Tensor, hi: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles that rows with these bounds [..., ROWS] meet, as ``tile_span`` of ``triton.common``.

    Returns:
        first, last, full_first and full_last, int32 [...]: tiles [first, last) are met, and of
        these [full_first, full_last) by every row as a whole.
    """
    seen = hi > lo
    end = torch.where(seen, hi, 0).amax(-1)
    start = torch.where(seen, lo, end[..., None]).amin(-1)
    first, last = start // width, (end + width - 1) // width
    full_first = ((lo.amax(-1) + width - 1) // width).maximum(first).minimum(last)
    full_last = (hi.amin(-1) // width).maximum(full_first).minimum(last)
    return first, last, full_first, full_last


def _entries(spans: Tensor, stream: Tensor, start: Tensor) -> Tensor:
    """The worklist of pairs of owned tiles.

    Args:
        spans: int32 [8, B, programs, 2], the clean and the noised tiles met.
        stream: [programs, 2].
        start: [programs, 2], first row of each owned tile.
    """
    firsts, counts = [], []
    for first, last in ((spans[0], spans[1]), (spans[4], spans[5])):
        low = torch.where(last > first, first, 1 << 30).amin(-1)
        high = torch.where(last > first, last, 0).amax(-1)
        counts.append((high - low).clamp(min=0))
        firsts.append(torch.where(counts[-1] > 0, low, 0))
    steps = counts[0] + counts[1]
    # From tiles to steps.
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
