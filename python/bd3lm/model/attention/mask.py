"""The block-diffusion attention mask as intervals of keys (docs/math.md §7).

Every backend derives its own form from them. Training with L = 8 and S = 4, queries by keys::

              xt 0-3   xt 4-7   x0 0-3   x0 4-7
    xt 0-3      █
    xt 4-7               █        █
    x0 0-3                        █
    x0 4-7                        █        █

With a causal clean stream, an x0 query sees no x0 key after its own position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Intervals(NamedTuple):
    """Keys seen by each query, as half-open ranges of positions, int32 [B or 1, Tq].

    Query ``q`` sees clean keys ``clean_lo[q] <= j < clean_hi[q]`` and noised keys
    ``noised_lo[q] <= j < noised_hi[q]``; an empty range has ``lo == hi``. A padding query sees
    nothing, and its output is zero.
    """

    clean_lo: Tensor
    clean_hi: Tensor
    noised_lo: Tensor
    noised_hi: Tensor


Shape = tuple[int, int, bool, bool, int, bool, int]
"""Fields of a :class:`BlockMask` without the documents."""


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Description of a block-diffusion attention mask; nothing is materialised.

    Keys are ``[xt (L) ; x0 (L)]`` if ``noised``, else ``x0 (L)``. Queries are ``[xt ; x0]``, or
    ``xt`` alone (``clean_queries=False``: scoring, and the last layer), or without an xt stream
    positions ``first .. L-1`` of x0 (``first > 0``: earlier keys come from a cache).

    With an xt stream, x0 may end before its last block, which no xt position sees
    (``last_clean=False``).

    Queries of x0 before ``causal_end`` see no later position of x0; the others see their block.

    Use the constructors :meth:`training`, :meth:`denoise` and :meth:`clean`.

    Attributes:
        seq_len: L, the number of positions in each key stream.
        block_size: S >= 1; need not divide L (the last block is then shorter).
        noised: whether there is an xt stream.
        clean_queries: whether x0 positions are queries.
        first: position of the first query; 0 unless ``noised`` is False.
        last_clean: whether the last block of x0 is there; True unless ``noised``.
        causal_end: number of leading x0 positions that attend causally; 0 where they attend to
            their whole block.
        doc_ids: int32 [B, L] or None; attention stays inside a document, and -1 is padding.
            The positions of a document are contiguous.
    """

    seq_len: int
    block_size: int
    noised: bool
    clean_queries: bool
    first: int = 0
    last_clean: bool = True
    causal_end: int = 0
    doc_ids: Tensor | None = None

    @classmethod
    def training(
        cls,
        seq_len: int,
        block_size: int,
        doc_ids: Tensor | None = None,
        *,
        causal_end: int = 0,
    ) -> BlockMask:
        """Queries and keys of both streams: Tq = Tk = 2L."""
        return cls(
            seq_len,
            block_size,
            noised=True,
            clean_queries=True,
            causal_end=causal_end,
            doc_ids=doc_ids,
        )

    @classmethod
    def denoise(cls, seq_len: int, block_size: int, doc_ids: Tensor | None = None) -> BlockMask:
        """Queries of xt, keys of both streams: Tq = L, Tk = 2L."""
        return cls(seq_len, block_size, noised=True, clean_queries=False, doc_ids=doc_ids)

    def without_last_clean(self) -> BlockMask:
        """Copy of a mask with an xt stream whose x0 ends before its last block."""
        return replace(self, last_clean=False)

    def apart(self, views: int) -> tuple[BlockMask, BlockMask]:
        """Masks of a training step whose rows have several noised streams and one clean stream.

        Returns:
            ``(noised, clean)``: queries of a noised stream, which see their own stream and the
            clean one; and the clean stream alone.
        """
        docs = self.doc_ids
        noised = replace(
            self, clean_queries=False, doc_ids=None if docs is None else docs.repeat(views, 1)
        )
        end = self.clean_len
        clean = self.clean(
            end,
            self.block_size,
            None if docs is None else docs[:, :end].contiguous(),
            causal_end=min(self.causal_end, end),
        )
        return noised, clean

    @classmethod
    def clean(
        cls,
        seq_len: int,
        block_size: int,
        doc_ids: Tensor | None = None,
        first: int = 0,
        *,
        causal_end: int = 0,
    ) -> BlockMask:
        """Block-causal attention of one stream: Tq = L - first, Tk = L.

        ``block_size=1`` is causal, ``block_size=seq_len`` is full attention, ``first`` is the
        number of cached positions while decoding.
        """
        return cls(
            seq_len,
            block_size,
            noised=False,
            clean_queries=True,
            first=first,
            causal_end=causal_end,
            doc_ids=doc_ids,
        )

    @property
    def clean_len(self) -> int:
        """Positions of x0 among the keys: L, or those before the last block."""
        return self.seq_len if self.last_clean else before_last(self.seq_len, self.block_size)

    @property
    def num_queries(self) -> int:
        """Tq, the number of query rows."""
        if self.noised:
            return self.seq_len + (self.clean_len if self.clean_queries else 0)
        return self.seq_len - self.first

    @property
    def num_keys(self) -> int:
        """Tk, the number of key rows."""
        return self.clean_len + (self.seq_len if self.noised else 0)

    @property
    def shape(self) -> Shape:
        """Every field but the documents, in their order."""
        streams = self.noised, self.clean_queries
        sizes = self.seq_len, self.block_size
        return *sizes, *streams, self.first, self.last_clean, self.causal_end

    def intervals(self, device: torch.device | str = "cpu") -> Intervals:
        """Keys of every query, as ranges; cached if there are no documents."""
        if self.doc_ids is None:
            return _intervals_of(self.shape, str(device))
        return _intervals(self, device)

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """The mask as booleans [B or 1, Tq, Tk], True where attention is allowed."""
        if self.doc_ids is None:
            return used(_dense_of(self.shape, str(device)))
        return _materialise(self.intervals(device), self)


T = TypeVar("T")
_collections: list[list[object]] = []


@contextmanager
def collected_forms() -> Iterator[list[object]]:
    """Collect the cached forms of masks that are used meanwhile.

    A recorded CUDA graph reads their memory again, so it keeps them when the cache does not.
    """
    forms: list[object] = []
    _collections.append(forms)
    try:
        yield forms
    finally:
        _collections.pop()


def used(form: T) -> T:
    """Return a cached form, and show it to :func:`collected_forms`."""
    for forms in _collections:
        forms.append(form)
    return form


def before_last(seq_len: int, block_size: int) -> int:
    """Positions before the last block of a row."""
    return (seq_len - 1) // block_size * block_size


class CachedMask(NamedTuple):
    """Block-causal attention over a cache whose length is held on the device.

    Query ``q`` sees keys ``j < end[q]``; keys beyond the largest end may hold any values.
    """

    end: Tensor
    """int32 [B or 1, Tq], each at least 1."""


class RangeMask(NamedTuple):
    """Any ranges of keys, e.g. those of drafts of a text and of the text itself in one cache.

    Keys are ``offset`` noised ones, then clean ones; keys that no query sees may hold any finite
    values.
    """

    intervals: Intervals
    offset: int

    def dense(self, num_keys: int) -> Tensor:
        """The mask as booleans [B or 1, Tq, Tk]."""
        key = torch.arange(num_keys, dtype=torch.int32, device=self.intervals.clean_lo.device)
        clean_lo, clean_hi, noised_lo, noised_hi = (bound[..., None] for bound in self.intervals)
        noised = (key >= noised_lo) & (key < noised_hi) & (key < self.offset)
        clean = (key - self.offset >= clean_lo) & (key - self.offset < clean_hi)
        return noised | (clean & (key >= self.offset))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for later calls, which may want gradients
def _intervals_of(shape: Shape, device: str) -> Intervals:
    return _intervals(BlockMask(*shape), device)


def _intervals(mask: BlockMask, device: torch.device | str) -> Intervals:
    seq_len, block_size = mask.seq_len, mask.block_size
    doc_ids = None if mask.doc_ids is None else mask.doc_ids.to(device)
    position = torch.arange(seq_len, dtype=torch.int32, device=device)[None]  # [1, L]
    start = position // block_size * block_size
    end = (start + block_size).clamp(max=seq_len)
    if doc_ids is None:
        doc_start, doc_end = torch.zeros_like(position), torch.full_like(position, seq_len)
    else:
        doc_start, doc_end = document_bounds(doc_ids, position)
    own_lo = torch.maximum(start, doc_start)
    own_hi = torch.minimum(end, doc_end)
    zero = torch.zeros_like(own_lo)
    live = torch.ones_like(own_lo) if doc_ids is None else (doc_ids >= 0).int()

    asking: list[tuple[slice, tuple[Tensor, Tensor, Tensor, Tensor]]] = []
    if mask.noised:
        before = torch.maximum(start, doc_start)
        asking.append((slice(None), (doc_start, before, own_lo, own_hi)))
    if mask.clean_queries:
        part = slice(mask.first, mask.clean_len)
        hi = torch.where(position < mask.causal_end, position + 1, own_hi)
        asking.append((part, (doc_start, hi, zero, zero)))
    columns = [
        torch.cat([(stream[i] * live)[:, part] for part, stream in asking], dim=1).contiguous()
        for i in range(4)
    ]
    return Intervals(*columns)


def document_bounds(doc_ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """First position and one past the last of each position's document; int32 [B, L]."""
    changed = doc_ids[:, 1:] != doc_ids[:, :-1]
    edge = torch.ones_like(doc_ids[:, :1], dtype=torch.bool)
    starts = torch.where(torch.cat([edge, changed], dim=1), position, 0)
    start = starts.cummax(dim=1).values
    seq_len = doc_ids.shape[1]
    ends = torch.where(torch.cat([changed, edge], dim=1), position + 1, seq_len)
    end = ends.flip(1).cummin(dim=1).values.flip(1)
    return start.int(), end.int()


def _materialise(intervals: Intervals, mask: BlockMask) -> Tensor:
    key = torch.arange(mask.seq_len, dtype=torch.int32, device=intervals.clean_lo.device)
    clean_lo, clean_hi, noised_lo, noised_hi = (bound[..., None] for bound in intervals)
    there = key[: mask.clean_len]
    clean = (there >= clean_lo) & (there < clean_hi)
    if not mask.noised:
        return clean
    return torch.cat([(key >= noised_lo) & (key < noised_hi), clean], dim=-1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _dense_of(shape: Shape, device: str) -> Tensor:
    mask = BlockMask(*shape)
    return _materialise(mask.intervals(device), mask)
