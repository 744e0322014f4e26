"""Reads rows of token files in object storage, piece by piece and each piece verified."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bd3lm.data.piece_cache import Ints, PieceCache
from bd3lm.errors import ConfigError, CorruptError
from bd3lm.storage import Remote, parse_bytes
from bd3lm.user_cache import cache_folder

DIGESTS = "digests.bin"
"""SHA-256 of each piece of a token file, 32 bytes each."""
LEAST_SLOTS = 16
"""Pieces of the smallest cache."""
FETCHERS = 4
"""Threads that fetch pieces ahead; each has a batch or a part of one."""
MERGED = 64
"""Neighbouring pieces that one request reads at most."""
SEQUENTIAL = 64
"""Pieces that are fetched together where a reader continues where the last one ended."""
KEPT = 16
"""Pieces that are fetched together where the cache has room for all."""

Ids = NDArray[np.uint16 | np.int32]


@dataclass(frozen=True)
class TokenFile:
    """The token file of a data set, or of one of its shards."""

    name: str
    bytes: int
    digests: BinaryIO
    """The local file of the digests of its pieces."""


class _FileRun(NamedTuple):
    """Neighbouring pieces of a token file."""

    name: str
    begin: int
    end: int
    piece: int
    digests: list[bytes]


class Ahead:
    """Pieces that are fetched before their rows are read; they stay until they are released."""

    def __init__(self, cache: PieceCache, slots: Ints, work: Future[None]) -> None:
        self._cache, self._slots, self._work = cache, slots, work

    def release(self) -> None:
        """Let others have the slots, and begin nothing any more."""
        self._cache.unpin(self._slots)
        if self._work.cancel():
            self._cache.unpin(self._slots)


class RemoteTokens:
    """Reads runs of tokens of a data set in object storage.

    Args:
        remote: the data set's folder.
        parts: its token files, in order.
        width: bytes of a token, 2 or 4.
        size: bytes of a piece.
        cache_size: bytes of the cache.

    Attributes:
        requests: parts of files that were requested.
        bytes: that were fetched.
    """

    def __init__(
        self,
        remote: Remote,
        parts: Sequence[TokenFile],
        width: int,
        size: int,
        cache_size: int | str,
    ) -> None:
        self._remote, self._parts, self._size = remote, parts, size
        self._dtype: type[np.uint16 | np.int32] = np.uint16 if width == 2 else np.int32
        self._width = width
        counts = [-(-part.bytes // size) for part in parts]
        self._pieces = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        tokens = [part.bytes // width for part in parts]
        self._tokens = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64)
        slots = parse_bytes(cache_size) // size
        if slots < LEAST_SLOTS:
            raise ConfigError("cache-size", cache_size, f"at least {LEAST_SLOTS * size:,} bytes")
        total = int(self._pieces[-1])
        self._cache = PieceCache(total, size, slots, cache_folder() / "rows", self._fetch)
        self._threads = ThreadPoolExecutor(FETCHERS, thread_name_prefix="bd3lm-fetch")
        self._read_to = -1
        self.requests = self.bytes = 0

    def __call__(self, runs: Ints) -> Ids:
        """Read runs of tokens.

        Args:
            runs: first token and the one after the last of each, int64 [N, 2].

        Returns:
            Their ids, one run after the other; uint16 or int32.

        Raises:
            CorruptError: a piece is not the one that was prepared.
            MissingFileError: the token file is gone.
            StorageError: the storage refuses to give it.
        """
        pieces, offsets, lengths = self._places(runs)
        ends = np.cumsum(lengths)
        if not len(ends):
            return np.empty(0, self._dtype)
        in_order, self._read_to = int(runs[0, 0]) == self._read_to, int(runs[-1, 1])
        out = np.empty(int(ends[-1]) // self._width, self._dtype)
        view = memoryview(out.data).cast("B")
        together = max(self._cache.slots // 4, 1)
        for first in range(0, len(pieces), together):
            some = slice(first, first + together)
            wanted = self._units(pieces[some], in_order=in_order)
            slots = self._cache.pin(wanted)
            assert slots is not None, "it waits for them"
            try:
                self._cache.fill(wanted, slots)
                mine = slots[np.searchsorted(wanted, pieces[some])]
                where = zip(mine, offsets[some], lengths[some], ends[some], strict=True)
                for slot, offset, length, end in (map(int, place) for place in where):
                    self._cache.read(slot, offset, view[end - length : end])
            finally:
                self._cache.unpin(slots)
        return out

    def fetch_ahead(self, runs: Ints) -> Ahead | None:
        """Begin to fetch the pieces of runs that are read soon.

        Returns:
            Them; None where the cache has no room for them now.
        """
        pieces = self._units(self._places(runs)[0])
        room = self._cache.slots // 2 - self._cache.num_pinned
        if len(pieces) > room and not self._cache.holds_all:
            return None
        slots = self._cache.pin(pieces, 2, wait=False)
        if slots is None:
            return None
        return Ahead(self._cache, slots, self._threads.submit(self._fill, pieces, slots))

    def _fill(self, pieces: Ints, slots: Ints) -> None:
        """Fetch pieces; where that fails, their reader tries again and raises the error."""
        try:
            self._cache.fill(pieces, slots)
        finally:
            self._cache.unpin(slots)

    def _units(self, pieces: Ints, *, in_order: bool = False) -> Ints:
        """Pieces to fetch for these: with their neighbours where those are wanted soon or stay."""
        count = 1
        if self._cache.holds_all:
            count = KEPT
        elif in_order and self._cache.slots >= 16 * SEQUENTIAL:
            count = SEQUENTIAL
        if count == 1:
            return np.unique(pieces)
        first = count * np.unique(pieces // count)
        found = (first[:, None] + np.arange(count)).ravel()
        return found[found < self._pieces[-1]]

    def _places(self, runs: Ints) -> tuple[Ints, Ints, Ints]:
        """Pieces in which runs lie; the first byte in each, and the number of bytes."""
        runs = runs[runs[:, 0] < runs[:, 1]]
        begins, ends = self._piece_of(runs[:, 0]), self._piece_of(runs[:, 1] - 1)
        counts = ends - begins + 1
        run = np.repeat(np.arange(len(runs)), counts)
        within = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces = begins[run] + within
        part = np.searchsorted(self._pieces, pieces, side="right") - 1
        width = self._width
        first = self._tokens[part] + (pieces - self._pieces[part]) * (self._size // width)
        after = np.minimum(first + self._size // width, self._tokens[part + 1])
        low, high = np.maximum(runs[run, 0], first), np.minimum(runs[run, 1], after)
        return pieces, (low - first) * width, (high - low) * width

    def _piece_of(self, tokens: Ints) -> Ints:
        part = np.searchsorted(self._tokens, tokens, side="right") - 1
        inside = (tokens - self._tokens[part]) * self._width // self._size
        return self._pieces[part] + inside

    def _fetch(self, pieces: Ints) -> list[memoryview]:
        """Read pieces, whose numbers rise, and compare each with its digest.

        A piece that is not the right one is requested a second time.
        """
        found: dict[int, memoryview] = {}
        left = pieces
        for last in (False, True):
            runs = self._file_runs(left)
            contents = self._remote.read_ranges([(run.name, run.begin, run.end) for run in runs])
            self.requests += len(runs)
            self.bytes += sum(map(len, contents))
            bad: list[int] = []
            for run, content in zip(runs, contents, strict=True):
                for index, digest in enumerate(run.digests):
                    own = memoryview(content)[index * self._size : (index + 1) * self._size]
                    if hashlib.sha256(own).digest() == digest:
                        found[run.piece + index] = own
                    elif last:
                        raise CorruptError(self._damage(run, index))
                    else:
                        bad.append(run.piece + index)
            if not bad:
                break
            left = np.array(bad)
        return [found[piece] for piece in pieces.tolist()]

    def _file_runs(self, pieces: Ints) -> list[_FileRun]:
        """Join neighbouring pieces of a file, whose numbers rise."""
        part = np.searchsorted(self._pieces, pieces, side="right") - 1
        cuts = np.flatnonzero((np.diff(pieces) != 1) | (np.diff(part) != 0)) + 1
        runs: list[_FileRun] = []
        for begin, end in pairwise([0, *cuts.tolist(), len(pieces)]):
            for first in range(begin, end, MERGED):
                count = min(end - first, MERGED)
                runs.append(self._file_run(int(pieces[first]), count, int(part[first])))
        return runs

    def _file_run(self, piece: int, count: int, part: int) -> _FileRun:
        own, first = self._parts[part], piece - int(self._pieces[part])
        digests = os.pread(own.digests.fileno(), 32 * count, 32 * first)
        return _FileRun(
            own.name,
            first * self._size,
            min((first + count) * self._size, own.bytes),
            piece,
            [digests[at : at + 32] for at in range(0, 32 * count, 32)],
        )

    def _damage(self, run: _FileRun, index: int) -> str:
        begin = run.begin + index * self._size
        end = min(begin + self._size, run.end)
        return (
            f"{self._remote}/{run.name}: piece {begin // self._size} (bytes {begin} to {end}) is "
            f"not the one that was prepared, by its SHA-256 in {DIGESTS}; copy the data set there "
            "again"
        )
