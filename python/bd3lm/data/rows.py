"""Packed rows and the batches that training and scoring read."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm import _core
from bd3lm.data.noise import NoiseSpec, buffer
from bd3lm.data.remote_tokens import Ahead
from bd3lm.data.store import Dataset, TokenArrays
from bd3lm.errors import ConfigError


@dataclass(frozen=True)
class CleanBatch:
    """Rows as they are.

    Attributes:
        x0: clean ids, int64 [B, L]; position 0 is BOS.
        noisable: bool [B, L]: may be noised, and is scored.
        doc_ids: int32 [B, L], -1 for padding; None where every row is full and counts as one.
    """

    x0: Tensor
    noisable: Tensor
    doc_ids: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Noised rows of one training step, or a part of them.

    Attributes:
        x0: clean ids, int64 [B, L].
        xt: noised ids, int64 [n·B, L]: n views of the rows, one after the other.
        masked: flat positions b*L+i of the masked tokens of ``xt``, int64 [M].
        weight: loss weight of each of them, float32 [M].
        mask_prob: noise level p of each block, float32 [n·B, K].
        doc_ids: int32 [B, L], -1 for padding; None where every row is full and counts as one.
        noisable: whether a token could have been masked, bool [B, L].
        num_noisable: how many could: the loss is per such token.
        block_size: S of the noise.
        step: of the run, from 0.
    """

    x0: Tensor
    xt: Tensor
    masked: Tensor
    weight: Tensor
    mask_prob: Tensor
    doc_ids: Tensor | None
    noisable: Tensor
    num_noisable: int
    block_size: int
    step: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; from pinned memory, without waiting for the copy."""

        def move(value: object) -> object:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


class Rows:
    """Rows of L tokens aligned to blocks of S, as a plan over a data set's documents.

    Args:
        data: the documents.
        seq_len: L >= 2.
        block_size: S, dividing L.
        packing: ``wrap`` (concatenate and cut), ``aligned`` (documents start on block boundaries,
            each behind a BOS) or ``best_fit`` (the same, documents whole where they fit).
        row_eos: wrap: close every row with an EOS of its own, as the paper's code does.
        stride: wrap: only the last so many tokens of a row are noisable; rows overlap by the
            rest, so that every token is scored once with more context.
        keep_last: wrap: keep a last row that is not full, padded; for scoring.
        documents: attention stays inside documents; None: in every packing but ``wrap``.

    Raises:
        ConfigError: S does not divide L, a stride or packing that is not allowed, or a data set too
            short for one row.
    """

    def __init__(
        self,
        data: Dataset | TokenArrays,
        *,
        seq_len: int,
        block_size: int,
        packing: Literal["wrap", "aligned", "best_fit"] = "wrap",
        row_eos: bool = False,
        stride: int | None = None,
        keep_last: bool = False,
        documents: bool | None = None,
    ) -> None:
        self.seq_len, self.block_size, self.row_eos = seq_len, block_size, row_eos
        self._remote = data.remote
        self.documents = packing != "wrap" if documents is None else documents
        self.core = _core.RowPlan(
            data.core,
            seq_len=seq_len,
            block_size=block_size,
            packing=packing,
            row_eos=row_eos,
            stride=stride,
            keep_last=keep_last,
            documents=self.documents,
        )
        # No room is needed where every row is full and counts as one document.
        self.doc_ids_len = seq_len if self.documents or self.core.may_pad else 0

    def __len__(self) -> int:
        return len(self.core)

    @property
    def num_stream_tokens(self) -> int:
        """Tokens of the data set, whether or not they fell into a row."""
        return self.core.num_stream_tokens

    @property
    def are_remote(self) -> bool:
        """Whether the rows are read from object storage."""
        return self._remote is not None

    def fetch_ahead(self, rows: NDArray[np.uint64]) -> Ahead | None:
        """Begin to fetch rows that are read soon.

        Returns:
            What they need of the cache; None where it has no room now, or nothing is remote.
        """
        return None if self._remote is None else self._remote.fetch_ahead(self.core.runs(rows))

    def batch(self, rows: NDArray[np.uint64]) -> CleanBatch:
        """The given rows.

        Args:
            rows: row numbers, uint64 [B].

        Raises:
            ConfigError: a row that does not exist.
        """
        x0, noisable, doc_ids = self.core.gather(rows)
        return CleanBatch(
            torch.from_numpy(x0),
            torch.from_numpy(noisable),
            None if doc_ids is None else torch.from_numpy(doc_ids),
        )


class Loader:
    """Noised batches of a data set, shuffled or in its own order.

    Order and noise are functions of (seed, step, row of the global batch): never of how a batch
    is cut into parts, nor of threads. Strata, and masks after the first of a row, also read its
    number of rows. There is no state to save; a step number is all it takes.

    Args:
        rows: to draw from.
        batch_size: rows of the global batch.
        seed: of order and noise.
        shuffle: draw a new order of the rows in each epoch; False: that of the data set.
        pinned: put batches into page-locked memory, from which a GPU copies while it computes.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        pinned: bool = False,
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.shuffle, self.pinned = shuffle, pinned

    def batch(self, step: int, spec: NoiseSpec, *, part: tuple[int, int] = (0, 1)) -> Batch:
        """The batch of a step, or a part of it.

        Args:
            step: from 0.
            spec: the noise to draw.
            part: ``(index, number)``: one of so many parts of consecutive rows, whose sizes
                differ by one row at most; a micro-batch, or a micro-batch of a rank.

        Raises:
            ConfigError: a part that does not exist, or noise these rows do not allow.
        """
        first, order = self._rows_of(step, part)
        size, masks = len(order), spec.masks
        shape = (size, self.rows.seq_len)
        block_size = spec.block_size or self.rows.block_size
        num_blocks = size * (self.rows.seq_len // block_size)
        pin = self.pinned
        x0, x0_out = buffer(shape, np.int64, pinned=pin)
        tokens = x0_out.size
        xt, xt_out = buffer((masks * size, self.rows.seq_len), np.int64, pinned=pin)
        noisable, noisable_out = buffer(shape, np.bool_, pinned=pin)
        masked, masked_out = buffer((masks * tokens,), np.int64, pinned=pin)
        masked_weight, masked_weight_out = buffer((masks * tokens,), np.float32, pinned=pin)
        mask_prob, mask_prob_out = buffer(
            (masks * size, self.rows.seq_len // block_size), np.float32, pinned=pin
        )
        doc_ids, doc_ids_out = buffer((size, self.rows.doc_ids_len), np.int32, pinned=pin)
        num_noisable, total, padded = 0, 0, False
        for number in range(masks):  # the clean rows are the same each time
            of_tokens = slice(total, total + tokens)
            num_noisable, count, padded = self.rows.core.gather_noised(
                spec._core,
                (self.seed, step, first + number * self.batch_size, masks * self.batch_size),
                order,
                block_size,
                x0=x0_out,
                noisable=noisable_out,
                doc_ids=doc_ids_out,
                xt=xt_out[number * tokens : (number + 1) * tokens],
                mask_prob=mask_prob_out[number * num_blocks : (number + 1) * num_blocks],
                masked=masked_out[of_tokens],
                masked_weight=masked_weight_out[of_tokens],
            )
            masked_out[total : total + count] += number * tokens
            total += count
        return Batch(
            x0=x0,
            xt=xt,
            masked=masked[:total],
            weight=masked_weight[:total],
            mask_prob=mask_prob,
            doc_ids=doc_ids if padded or self.rows.documents else None,
            noisable=noisable,
            num_noisable=num_noisable,
            block_size=block_size,
            step=step,
        )

    def fetch_ahead(self, step: int, part: tuple[int, int] = (0, 1)) -> Ahead | None:
        """Begin to fetch the rows of a later batch, or of a part of it; see :class:`Rows`."""
        return self.rows.fetch_ahead(self._rows_of(step, part)[1])

    def _rows_of(self, step: int, part: tuple[int, int]) -> tuple[int, NDArray[np.uint64]]:
        """First row of a part in its batch, and the rows of the data set that it has."""
        index, parts = part
        if not 0 <= index < parts <= self.batch_size:
            allowed = f"(index, number) with index < number, at most {self.batch_size} rows"
            raise ConfigError("part", part, allowed)
        first = index * self.batch_size // parts
        size = (index + 1) * self.batch_size // parts - first
        return first, self._order(step * self.batch_size + first, size)

    def _order(self, first: int, size: int) -> NDArray[np.uint64]:
        """Rows at places ``first..first + size`` of the endless sequence of epochs."""
        if self.shuffle:
            return _core.row_order(self.seed, len(self.rows), first, size)
        return np.arange(first, first + size, dtype=np.uint64) % np.uint64(len(self.rows))
