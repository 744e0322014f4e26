"""One block of all running rows: the interface between the sampler and a decoding strategy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import SampleConfig
from bd3lm.device import uploaded
from bd3lm.model import Transformer
from bd3lm.sample.draw import draw
from bd3lm.sample.plan import block_uniforms
from bd3lm.sample.state import SampleState
from bd3lm.systems import System, sigma_of


class Scored(NamedTuple):
    """Positions that one forward scored.

    Attributes:
        rows: rows of the batch, int64 [M], on the host.
        pos: positions in the block, int64 [M], on the host.
        row_dev: ``rows`` on the device.
        pos_dev: ``pos`` on the device.
        uniform: the number that draws each position's token, float64 [M], on the device.
        logits: [M, V], on the device; the mask token has -inf.
    """

    rows: NDArray[np.int64]
    pos: NDArray[np.int64]
    row_dev: Tensor
    pos_dev: Tensor
    uniform: Tensor
    logits: Tensor


class BlockDraw:
    """One block that a decoding strategy fills.

    A strategy is a function ``strategy(block: BlockDraw) -> Iterator[None]``. It calls
    :meth:`score` and :meth:`reveal` until :attr:`masked` is empty, and yields after each forward.

    Attributes:
        cfg: the sampling settings.
        system: the trained system.
        masked: positions without a token, bool [B, S]; :meth:`reveal` clears them.
        level: noise level of every position, uniform on [0, 1), float64 [B, S]. It is a function
            of (seed, row number, position), as is the number that draws the position's token.
        trained_length: L, positions of a training row.
    """

    def __init__(
        self,
        model: Transformer,
        system: System,
        cfg: SampleConfig,
        state: SampleState,
        *,
        bos_id: int,
        trained_length: int,
    ) -> None:
        self.model, self.system, self.cfg, self.trained_length = model, system, cfg, trained_length
        self._state, self._bos_id = state, bos_id
        self._size, self._device = system.block_size, state.tokens.device
        self._shift = system.shifts(model)
        start, size = state.start, system.block_size
        self.masked = state.masked[:, start : start + size].copy()
        numbers = [block_uniforms(cfg.seed, row.number, start // size, size) for row in state.rows]
        both = np.stack(numbers)  # [B, S, 2]
        self.level, self._uniform = both[..., 0], both[..., 1]

    def score(
        self,
        rows: NDArray[np.int64],
        pos: NDArray[np.int64],
        level: NDArray[np.float32],
        *,
        one_each: bool = False,
    ) -> Scored:
        """Run one forward; it also commits the keys and values of the finished blocks.

        Args:
            rows: rows of the batch [M].
            pos: positions in the block [M].
            level: noise level of each row [B], read by time-conditioned models only.
            one_each: every row has at most one position here.
        """
        numbers = self._uniform[rows, pos]
        row_dev, pos_dev, uniform = (
            uploaded(torch.from_numpy(x), self._device) for x in (rows, pos, numbers)
        )
        logits = self._logits(row_dev, pos_dev, level, one_each=one_each)
        self._state.count_forward(rows)
        return Scored(rows, pos, row_dev, pos_dev, uniform, logits)

    def reveal(self, scored: Scored, chosen: NDArray[np.bool_] | None = None) -> None:
        """Draw the tokens of scored positions and keep them.

        Args:
            scored: result of :meth:`score`.
            chosen: which of its positions, bool [M]; None: all.
        """
        rows, pos = scored.rows, scored.pos
        row_dev, pos_dev = scored.row_dev, scored.pos_dev
        uniform, logits = scored.uniform, scored.logits
        if chosen is not None:
            keep = torch.from_numpy(chosen).to(self._device)
            rows, pos = rows[chosen], pos[chosen]
            row_dev, pos_dev, uniform, logits = (
                x[keep] for x in (row_dev, pos_dev, uniform, logits)
            )
        token, log_p = draw(logits, uniform, self.cfg, self._seen(logits, row_dev))
        state = self._state
        state.tokens[row_dev, state.start + pos_dev] = token
        state.log_prob.index_add_(0, row_dev, log_p)
        self.masked[rows, pos] = False

    def _seen(self, logits: Tensor, rows: Tensor) -> Tensor | None:
        """Tokens that the repetition penalty discourages, bool [M, V]; None without one."""
        if self.cfg.repetition_penalty == 1:
            return None
        state = self._state
        seen = torch.zeros(len(state.rows), logits.shape[1], dtype=torch.bool, device=self._device)
        seen.scatter_(1, state.tokens[:, 1 : state.start + self._size], True)
        return seen[rows]

    def _logits(
        self, rows: Tensor, pos: Tensor, level: NDArray[np.float32], *, one_each: bool
    ) -> Tensor:
        state, size = self._state, self._size
        start, offset = state.start, self.system.prediction_offset
        waiting = start - state.committed
        ids = state.tokens[:, state.committed : start + size - offset]
        if state.committed == state.window_start > 0:
            ids = ids.clone()
            ids[:, 0] = self._bos_id
        sigma = self._sigma(level, waiting) if self.model.cfg.time_conditioning else None
        state.committed = start
        length, first = ids.shape[1], waiting - offset
        if self._shift:
            features = self._shifted(ids, rows, pos, waiting, sigma)
            return self.system.logits(self.model, features)
        if state.step is None:
            features = self.model.encode(
                ids,
                size,
                select=rows * length + first + pos,
                cache=state.cache,
                commit=waiting,
                sigma=sigma,
            )
            return self.system.logits(self.model, features)
        # A recorded forward has fixed shapes: one position of every row, or all of them.
        row = torch.arange(len(state.rows), device=self._device)
        if one_each:
            scored = torch.zeros_like(row).index_copy(0, rows, pos)
            select, answer = row * length + first + scored, rows
        else:
            every = torch.arange(size, device=self._device)
            select = (row[:, None] * length + first + every).flatten()
            answer = rows * size + pos
        return state.step(ids, select, commit=waiting, sigma=sigma)[answer]

    def _shifted(
        self, ids: Tensor, rows: Tensor, pos: Tensor, waiting: int, sigma: Tensor | None
    ) -> Tensor:
        """Features [M, D] of the positions before those to predict.

        The one before the block is only in the forward that commits it, so its features are kept.
        """
        state, length = self._state, ids.shape[1]
        select = (rows * length + waiting + pos - 1).clamp(min=0)
        if waiting:
            ends = torch.arange(len(ids), device=self._device) * length + waiting - 1
            select = torch.cat([select, ends])
        features = self.model.encode(
            ids, self._size, select=select, cache=state.cache, commit=waiting, sigma=sigma
        )
        if waiting:
            features, state.before = features[: len(rows)], features[len(rows) :]
        if state.before is None:  # the first block, whose first token is BOS
            return features
        return torch.where((pos == 0)[:, None], state.before[rows], features)

    def _sigma(self, level: NDArray[np.float32], waiting: int) -> Tensor:
        """Sigma of every block of the forward, [B, blocks]; finished blocks are clean."""
        p = np.zeros((len(level), waiting // self._size + 1), dtype=np.float32)
        p[:, -1] = level
        return uploaded(sigma_of(torch.from_numpy(p)), self._device)
