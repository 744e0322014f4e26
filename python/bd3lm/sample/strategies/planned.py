"""First hitting and ancestral sampling: the forwards of a block are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator

from bd3lm.sample.block import BlockDraw
from bd3lm.sample.plan import plan_block


def planned(block: BlockDraw) -> Iterator[None]:
    """Reveal positions by their noise levels (docs/math.md §8).

    The order depends on the levels alone, so nothing is read back from the device.
    """
    cfg = block.cfg
    grid = None if cfg.steps is None else block.system.level_grid(cfg.steps)
    one_each = grid is None and cfg.tokens_per_forward == 1
    for forward in plan_block(block.level, block.masked, cfg.tokens_per_forward, grid):
        block.reveal(block.score(forward.rows, forward.pos, forward.level, one_each=one_each))
        yield
