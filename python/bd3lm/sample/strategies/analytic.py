"""Analytic (Tweedie) steps of systems whose scores need not sum to one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bd3lm.sample.block import BlockDraw

FINAL_LEVEL = 1e-5
"""Noise level at which the last forward reveals every position that is left."""


def analytic(block: BlockDraw) -> Iterator[None]:
    """Reveal positions step by step on a grid of levels (docs/math.md §5).

    A last forward reveals the rest: at most N + 1 forwards.
    """
    hidden = np.ones(block.masked.shape)  # probability of being still masked
    steps = block.cfg.steps or block.trained_length
    grid = np.maximum(block.system.level_grid(steps), FINAL_LEVEL)
    for index in range(steps + 1):
        rows, pos = block.masked.nonzero()
        if len(rows) == 0:
            return
        level = np.full(len(block.masked), grid[index], dtype=np.float32)
        scored = block.score(rows, pos, level)
        chosen = None
        if index < steps:
            # A position is revealed once that probability falls below its own level.
            share = (grid[index] - grid[index + 1]) / grid[index]
            mass = block.system.reveal_mass(scored.logits).cpu().numpy()
            hidden[rows, pos] *= np.maximum(1.0 - mass * share, 0.0)
            chosen = hidden[rows, pos] <= block.level[rows, pos]
        block.reveal(scored, chosen)
        yield
