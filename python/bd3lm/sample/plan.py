"""Which positions of a block get their tokens in which forward (MATH §8), decided beforehand.

Every masked position has a noise level of its own, uniform on (0, 1): it is masked at levels above
and clean below. First hitting takes the positions one by one from the highest level down;
ancestral sampling on a grid takes together those that fall between two of its points. Where a
system's probabilities sum to one neither depends on what the model says, so the host knows every
forward of a block before it begins, and nothing has to be read back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bd3lm.config import SampleConfig


@dataclass(frozen=True)
class Forward:
    """One forward of a block.

    Attributes:
        rows: places in the batch of the positions revealed, int64 [M].
        spots: their positions in the block, int64 [M].
        level: noise level that each row's model is told, float32 [B].
    """

    rows: NDArray[np.int64]
    spots: NDArray[np.int64]
    level: NDArray[np.float32]


def plan_block(
    level: NDArray[np.float64],
    masked: NDArray[np.bool_],
    cfg: SampleConfig,
    grid: NDArray[np.float64] | None,
) -> list[Forward]:
    """The forwards of one block for all rows, side by side: each row's first, then each second.

    Args:
        level: of every position, uniform on [0, 1), [B, S].
        masked: positions to fill, [B, S].
        cfg: ``tokens_per_forward`` of first hitting.
        grid: p(t_0) = 1 > … > p(t_N) = 0 of ancestral sampling; None: first hitting.
    """
    turn = _turns(level, masked, grid, cfg.tokens_per_forward)
    count = int(turn.max(initial=-1)) + 1
    forwards = []
    for index in range(count):
        now = turn == index
        rows, spots = now.nonzero()
        if grid is None:
            told = np.where(now, level, 0.0).max(axis=1)
        else:
            # The point of the grid above the levels that are revealed.
            highest = np.where(now, level, -1.0).max(axis=1)
            told = grid[len(grid) - 1 - np.searchsorted(grid[::-1], highest, side="right")]
        forwards.append(Forward(rows, spots, told.astype(np.float32)))
    return forwards


def _turns(
    level: NDArray[np.float64],
    masked: NDArray[np.bool_],
    grid: NDArray[np.float64] | None,
    together: int,
) -> NDArray[np.int64]:
    """In which of its row's forwards each position is revealed; -1 where it is not masked."""
    falling = np.where(masked, -level, np.inf)
    rank = falling.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    if grid is None:
        return np.where(masked, rank // together, -1)
    step = np.searchsorted(-grid, -level, side="right")  # a level below p_j and not below p_{j+1}
    turn = np.full(level.shape, -1)
    for row in range(len(level)):
        # A row's own steps only: those in which nothing of it is revealed cost no forward.
        _, order = np.unique(step[row][masked[row]], return_inverse=True)
        turn[row][masked[row]] = order
    return turn


def block_uniforms(seed: int, row: int, block: int, size: int) -> NDArray[np.float64]:
    """All randomness of one block of one row: each position's level and the number for its token.

    Returns:
        float64 [S, 2], in [0, 1); a function of its arguments alone.
    """
    bits = np.random.Philox(key=[seed, row], counter=[0, 0, 0, block])
    return np.random.Generator(bits).random((size, 2))
