"""State of the rows that a sampler is drawing."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.model import DecodeStep, KVCache


def window_start(start: int, block_size: int, window: int) -> int:
    """First position of the window in which the block at ``start`` is drawn.

    Args:
        start: position of the block.
        block_size: S.
        window: L, positions of a training row. A row beyond it moves on by half of it.
    """
    beyond = start + block_size - window
    if beyond <= 0:
        return 0
    shift = max(window // 2 // block_size, 1) * block_size
    return -(-beyond // shift) * shift


@dataclass
class RowState:
    """Counters of one row; none of them depends on the other rows of the batch.

    Attributes:
        number: key of its randomness, with the seed.
        start: first position of the first block that has a hole.
        nfe: forwards that scored one of its positions or filled its cache.
        fills: those of them that only filled the cache.
        drawn: tokens drawn so far.
        finished: whether it has ended, and only keeps its place in the batch.
    """

    number: int
    start: int
    finished: bool = False
    nfe: int = 0
    fills: int = 0
    drawn: int = 0


@dataclass
class SampleState:
    """The running rows, all at the same block.

    Attributes:
        tokens: int64 [B, length], the mask id where nothing is drawn yet.
        masked: positions without a token, bool [B, length], on the host.
        log_prob: log p of the tokens drawn so far, float64 [B].
        rows: one counter a row.
        cache: keys and values of the committed positions.
        step: the CUDA-graph forward through ``cache``; None where forwards are not replayed.
        window_start: position of ``tokens`` that the first cached position holds.
        committed: positions of ``tokens`` whose keys and values are cached.
        start: first position of the current block.
        before: with ``token_shift``, features of the last committed position [B, D].
    """

    tokens: Tensor
    masked: NDArray[np.bool_]
    log_prob: Tensor
    rows: list[RowState]
    cache: KVCache
    step: DecodeStep | None
    window_start: int
    committed: int
    start: int
    before: Tensor | None = None

    def __post_init__(self) -> None:
        self.given = ~self.masked

    def count_forward(self, rows: NDArray[np.int64]) -> None:
        """Add one forward to each of these rows, however often it is listed."""
        for row in np.unique(rows):
            self.rows[row].nfe += 1

    def count_fill(self, row: RowState) -> None:
        """Add one forward that only fills the cache."""
        row.nfe += 1
        row.fills += 1

    def ids(self, row: int, end: int) -> list[int]:
        """Tokens of a row after BOS, up to position ``end``."""
        return self.tokens[row, 1:end].tolist()

    @property
    def running(self) -> bool:
        """Return whether any row has not ended."""
        return not all(row.finished for row in self.rows)

    def end(self, finished: Container[int]) -> bool:
        """Mark rows as finished and remove them; True if the cache then has new tensors.

        Where forwards are replayed, new tensors need new graphs, which take as long as many
        forwards. So there the rows keep their places until half of the batch has ended.
        """
        for index, row in enumerate(self.rows):
            if index in finished:
                row.finished = True
                self.masked[index] = False
        left = sum(not row.finished for row in self.rows)
        if left == len(self.rows) or (self.step is not None and 2 * left > len(self.rows)):
            return False
        self._remove_finished()
        return True

    def _remove_finished(self) -> None:
        keep = [index for index, row in enumerate(self.rows) if not row.finished]
        self.rows = [self.rows[row] for row in keep]
        self.masked, self.given = self.masked[keep], self.given[keep]
        alive = torch.tensor(keep, dtype=torch.int64, device=self.tokens.device)
        self.tokens = self.tokens.index_select(0, alive)
        self.log_prob = self.log_prob.index_select(0, alive)
        if self.before is not None:
            self.before = self.before.index_select(0, alive)
        self.cache.keep(alive)
