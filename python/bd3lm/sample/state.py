"""The rows that a sampler still draws, side by side."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.model import DecodeStep, KVCache


@dataclass
class RowState:
    """What one row knows about itself."""

    number: int
    """Names its randomness, whatever the batch."""
    nfe: int = 0
    fills: int = 0
    drawn: int = 0


@dataclass
class Running:
    """The rows still running, in lockstep by blocks."""

    tokens: Tensor
    masked: NDArray[np.bool_]
    """Positions that have no token yet, bool [B, length]; the host knows them."""
    log_prob: Tensor
    rows: list[RowState]
    cache: KVCache
    step: DecodeStep | None
    """The forward through ``cache``, where forwards are replayed."""
    base: int
    """Position of ``tokens`` that the first cached one stands for."""
    committed: int
    """Positions of ``tokens`` whose keys and values are cached."""
    start: int
    """First position of the current block."""

    def __post_init__(self) -> None:
        self.given = ~self.masked

    def took_part(self, places: np.ndarray) -> None:
        """Count a forward for each of these rows, once."""
        for place in np.unique(places):
            self.rows[place].nfe += 1

    def ids(self, place: int, end: int) -> list[int]:
        """Tokens of a row after BOS."""
        return self.tokens[place, 1:end].tolist()

    def drop(self, ended: Container[int]) -> bool:
        """Leave rows behind; tells whether there were any, which gives the cache new tensors."""
        keep = [place for place in range(len(self.rows)) if place not in ended]
        if len(keep) == len(self.rows):
            return False
        self.rows = [self.rows[place] for place in keep]
        self.masked, self.given = self.masked[keep], self.given[keep]
        alive = torch.tensor(keep, dtype=torch.int64, device=self.tokens.device)
        self.tokens = self.tokens.index_select(0, alive)
        self.log_prob = self.log_prob.index_select(0, alive)
        self.cache.keep(alive)
        return True
