"""Texts as rows of their own, for a likelihood given a prompt and for texts longer than a row.

Position 0 of a row is BOS, so token i of a text has position i + 1, in the same block as when a
sampler draws it. A text longer than L is cut into the windows of the sampler
(:class:`bd3lm.sample.Sampler`): those of its blocks that are drawn in one window are scored in one
row, which holds at least L/2 tokens of context where there are as many. Each token is scored once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bd3lm.config import check
from bd3lm.data.rows import CleanBatch

Part = tuple[Sequence[int], Sequence[int]]
"""Ids of a prompt, which is context, and of an answer, which is scored."""


@dataclass(frozen=True)
class _Row:
    ids: NDArray[np.int64]
    """Whole blocks; the mask token at positions behind the answer."""
    scored: slice
    owner: int


class Windows:
    """Rows that score answers given prompts (a :class:`~bd3lm.evaluate.likelihood.RowSource`).

    A prompt's tail in the answer's first block is clean. Positions behind the answer in its last
    block stay masked: this is the likelihood of a sampler that fills them last.

    Args:
        parts: prompts and answers.
        seq_len: L, positions of a window.
        block_size: S, dividing L.
        bos_id: token of position 0.
        mask_id: the mask token.
        vocab_size: V.

    Raises:
        ConfigError: an empty answer, or ids outside the vocabulary.
    """

    row_eos = False

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        seq_len: int,
        block_size: int,
        bos_id: int,
        mask_id: int,
        vocab_size: int,
    ) -> None:
        self.seq_len, self.block_size = seq_len, block_size
        self.bos_id, self.mask_id = bos_id, mask_id
        self._rows: list[_Row] = []
        for owner, (prompt, answer) in enumerate(parts):
            check(len(answer) > 0, "answer", "no tokens", "at least one token")
            ids = np.array([bos_id, *prompt, *answer], dtype=np.int64)
            known = (ids >= 0) & (ids < vocab_size) & (ids != mask_id)
            allowed = f"ids in [0, {vocab_size}) other than the mask token {mask_id}"
            check(bool(known.all()), "ids", ids[~known][:1].tolist(), allowed)
            self._rows += self._cut(ids, 1 + len(prompt), owner)
        # Rows of about one length come together, so that little of a batch is padding.
        self._rows.sort(key=lambda row: len(row.ids))
        self.owner = np.array([row.owner for row in self._rows], dtype=np.int64)
        self.num_stream_tokens = sum(len(answer) for _, answer in parts)
        self.keys = np.array([_key(row) for row in self._rows], dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: NDArray[np.uint64]) -> CleanBatch:
        """Rows padded to the longest of them."""
        chosen = [self._rows[int(index)] for index in rows]
        length = max(len(row.ids) for row in chosen)
        x0 = torch.full((len(chosen), length), self.bos_id)
        noisable = torch.zeros(x0.shape, dtype=torch.bool)
        doc_ids = torch.full(x0.shape, -1, dtype=torch.int32)
        for place, row in enumerate(chosen):
            x0[place, : len(row.ids)] = torch.from_numpy(row.ids)
            noisable[place, row.scored] = True
            doc_ids[place, : len(row.ids)] = 0
        padded = bool((doc_ids < 0).any())
        return CleanBatch(x0, noisable, doc_ids if padded else None)

    def totals(self, row_values: NDArray[np.float64], texts: int) -> NDArray[np.float64]:
        """Sums of the rows' values over each text [texts]."""
        totals = np.zeros(texts)
        np.add.at(totals, self.owner, row_values)
        return totals

    def _cut(self, ids: NDArray[np.int64], first: int, owner: int) -> list[_Row]:
        """Rows of one text, whose positions from ``first`` on are scored."""
        size, rows = self.block_size, []
        position = first
        while position < len(ids):
            base, end = self._window(position)
            end = min(end, len(ids))
            own = ids[base:end].copy()
            own[0] = self.bos_id
            behind = -len(own) % size
            own = np.append(own, np.full(behind, self.mask_id))
            rows.append(_Row(own, slice(position - base, end - base), owner))
            position = end
        return rows

    def _window(self, position: int) -> tuple[int, int]:
        """Begin of the window in which a position is drawn, and the end of its drawn positions.

        With S = L a window is one block without context: BOS and the next L - 1 tokens.
        """
        if self.block_size == self.seq_len:
            base = (position - 1) // (self.seq_len - 1) * (self.seq_len - 1)
            return base, base + self.seq_len
        if position < self.seq_len:
            return 0, self.seq_len
        shift = max(self.seq_len // 2 // self.block_size, 1) * self.block_size
        start = position // self.block_size * self.block_size
        base = -(-(start + self.block_size - self.seq_len) // shift) * shift
        return base, base + self.seq_len


def _key(row: _Row) -> int:
    """Key of the row's randomness, a function of its tokens alone."""
    text = row.ids.tobytes() + f"{row.scored}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")
