"""Parallel decoding: a forward reveals every position that the model is sure of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import SampleConfig
from bd3lm.sample.block import BlockDraw


def parallel(block: BlockDraw) -> Iterator[None]:
    """Reveal the next position in the order of the settings, and all others that are sure.

    The order is that of first hitting, or begins with the most probable token. How many are left
    has to be read from the device after each forward.
    """
    cfg = block.cfg
    while block.masked.any():
        rows, pos = block.masked.nonzero()
        level = np.where(block.masked, block.level, -1.0)
        scored = block.score(rows, pos, level.max(axis=1).astype(np.float32))
        if cfg.order == "confidence":
            next_ones = surest(scored.logits, rows, cfg.tokens_per_forward)
        else:
            next_ones = pos == level.argmax(axis=1)[rows]
        block.reveal(scored, next_ones | sure(cfg, scored.logits, rows, next_ones))
        yield


def surest(logits: Tensor, rows: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """The ``count`` positions of every row whose top probability is largest, bool [M].

    Of equal ones the first is taken.

    Args:
        logits: [M, V].
        rows: row of each position, ascending [M].
        count: at least 1.
    """
    top = logits.double().log_softmax(-1).amax(-1).cpu().numpy()
    order = np.lexsort((-top, rows))
    first = np.searchsorted(rows, rows)  # index of each row's first position
    found = np.zeros(len(rows), dtype=bool)
    found[order] = np.arange(len(rows)) - first < count
    return found


def sure(
    cfg: SampleConfig, logits: Tensor, rows: NDArray[np.int64], next_one: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Positions below the entropy bound or above the probability threshold, bool [M].

    Args:
        cfg: ``threshold`` or ``entropy_bound``.
        logits: [M, V].
        rows: row of each position [M].
        next_one: positions that are revealed in any case [M].
    """
    if cfg.threshold is None and cfg.entropy_bound is None:
        return np.zeros(len(rows), dtype=bool)
    log_p = logits.double().log_softmax(-1)
    if cfg.threshold is not None:
        return (log_p.amax(-1).exp() >= cfg.threshold).cpu().numpy()
    assert cfg.entropy_bound is not None
    entropy = torch.special.entr(log_p.exp()).sum(-1).cpu().numpy()
    # In each row: first hitting's own position, then the surest. The sum of all entropies but the
    # largest must stay within the bound.
    order = np.lexsort((entropy, ~next_one, rows))
    found = np.zeros(len(rows), dtype=bool)
    spent = largest = 0.0
    for index, at in enumerate(order):
        if index == 0 or rows[at] != rows[order[index - 1]]:
            spent = largest = 0.0
        spent += entropy[at]
        largest = max(largest, entropy[at])
        found[at] = spent - largest <= cfg.entropy_bound
    return found
