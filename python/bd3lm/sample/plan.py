"""The forwards of a block, decided before the first of them (docs/math.md §8).

Every masked position has a noise level of its own, uniform on (0, 1): it is masked at levels above
and clean below. First hitting reveals the positions one by one, from the highest level down.
Ancestral sampling reveals together those between two points of a grid. Where the scores of a
system sum to one, neither depends on the model, so the host knows every forward of a block
beforehand and reads nothing back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Forward:
    """One forward of a block.

    Attributes:
        rows: rows of the batch whose positions are revealed, int64 [M].
        pos: those positions in the block, int64 [M].
        level: noise level of each row, for time-conditioned models, float32 [B].
    """

    rows: NDArray[np.int64]
    pos: NDArray[np.int64]
    level: NDArray[np.float32]


def plan_block(
    level: NDArray[np.float64],
    masked: NDArray[np.bool_],
    tokens_per_forward: int = 1,
    grid: NDArray[np.float64] | None = None,
) -> list[Forward]:
    """List the forwards of one block: the first of every row, then the second of every row.

    Args:
        level: of every position, uniform on [0, 1), [B, S].
        masked: positions to fill, [B, S].
        tokens_per_forward: positions that a forward of first hitting reveals.
        grid: p(t_0) = 1 > … > p(t_N) = 0 of ancestral sampling; None: first hitting.
    """
    index = _forward_of(level, masked, grid, tokens_per_forward)
    forwards = []
    for number in range(int(index.max(initial=-1)) + 1):
        now = index == number
        rows, pos = now.nonzero()
        if grid is None:
            given = np.where(now, level, 0.0).max(axis=1)
        else:
            # The point of the grid above the revealed levels.
            highest = np.where(now, level, -1.0).max(axis=1)
            given = grid[len(grid) - 1 - np.searchsorted(grid[::-1], highest, side="right")]
        forwards.append(Forward(rows, pos, given.astype(np.float32)))
    return forwards


def _forward_of(
    level: NDArray[np.float64],
    masked: NDArray[np.bool_],
    grid: NDArray[np.float64] | None,
    tokens_per_forward: int,
) -> NDArray[np.int64]:
    """Index of the forward of its row that reveals each position; -1 where none does."""
    falling = np.where(masked, -level, np.inf)
    rank = falling.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    if grid is None:
        return np.where(masked, rank // tokens_per_forward, -1)
    step = np.searchsorted(-grid, -level, side="right")  # p_j > level >= p_{j+1}
    index = np.full(level.shape, -1)
    for row in range(len(level)):
        # Steps that reveal nothing of a row cost it no forward.
        _, order = np.unique(step[row][masked[row]], return_inverse=True)
        index[row][masked[row]] = order
    return index


def block_uniforms(seed: int, row: int, block: int, size: int) -> NDArray[np.float64]:
    """All randomness of one block of one row: a level and a number for the token of each position.

    Args:
        seed: any 64-bit number, negative ones included.
        row: number of the row.
        block: number of the block.
        size: S.

    Returns:
        float64 [S, 2], in [0, 1); a function of its arguments alone.
    """
    bits = np.random.Philox(key=[seed % (1 << 64), row], counter=[0, 0, 0, block])
    return np.random.Generator(bits).random((size, 2))
