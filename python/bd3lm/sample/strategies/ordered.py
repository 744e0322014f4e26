"""Decoding in an order of its own: from left to right, or the surest position first.

Their exact likelihoods are those of :mod:`bd3lm.evaluate.orders`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bd3lm.sample.block import BlockDraw


def left_to_right(block: BlockDraw) -> Iterator[None]:
    """Reveal the first masked position of each row."""
    while block.masked.any():
        rows = np.flatnonzero(block.masked.any(axis=1))
        pos = block.masked[rows].argmax(axis=1)
        block.reveal(block.score(rows, pos, _nothing(block), one_each=True))
        yield


def by_confidence(block: BlockDraw) -> Iterator[None]:
    """Reveal the position of each row whose most probable token is the most probable.

    The model's own distributions decide, before temperature and nucleus; the first of equals
    comes first. The choice is read from the device after each forward.
    """
    while block.masked.any():
        rows, pos = block.masked.nonzero()
        scored = block.score(rows, pos, _nothing(block))
        top = (scored.logits.float().amax(-1) - scored.logits.float().logsumexp(-1)).cpu().numpy()
        confidence = np.full(block.masked.shape, -np.inf, dtype=np.float32)
        confidence[rows, pos] = top
        block.reveal(scored, pos == confidence.argmax(axis=1)[rows])
        yield


def _nothing(block: BlockDraw) -> np.ndarray:
    """Levels of models without time conditioning, which do not read them."""
    return np.zeros(len(block.masked), dtype=np.float32)
