"""A local file of bounded size that holds pieces of files which are elsewhere."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3lm.errors import StorageError
from bd3lm.files import storage_errors

EMPTY, FETCHING, READY = range(3)
"""States of a slot that belongs to a piece."""
FETCHED_TOGETHER = 4096
"""Pieces that one call of ``fetch`` brings at most: they are held in memory."""

Ints = NDArray[np.int64]


class PieceCache:
    """Pieces of one size in the slots of a file.

    A slot is read only after its piece was fetched and written. A new piece takes the slot of the
    one that came first among those that nobody needs. The file has no name, so that the system
    frees it when the process ends in any way.

    Args:
        pieces: number of pieces.
        size: bytes of a piece; the last ones may be shorter.
        slots: pieces that the file holds at most.
        folder: directory of the file.
        fetch: returns the verified content of pieces, whose numbers rise.

    Attributes:
        slots: pieces that the file holds at most.
    """

    def __init__(
        self,
        pieces: int,
        size: int,
        slots: int,
        folder: Path,
        fetch: Callable[[Ints], Sequence[bytes | memoryview]],
    ) -> None:
        self.slots, self._size, self._folder, self._fetch = min(pieces, slots), size, folder, fetch
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._slot_of = np.zeros(pieces, np.int32)  # slot + 1; 0: in none
        self._piece_in = np.full(self.slots, -1, np.int64)
        self._state = np.full(self.slots, EMPTY, np.uint8)
        self._pins = np.zeros(self.slots, np.int32)
        self._hand = 0
        self._changed = threading.Condition()

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for every piece."""
        return self.slots == len(self._slot_of)

    @property
    def num_pinned(self) -> int:
        """Number of slots that are needed now."""
        return int(np.count_nonzero(self._pins))

    def pin(self, pieces: Ints, count: int = 1, *, wait: bool = True) -> Ints | None:
        """Give pieces slots, which they keep until they are unpinned.

        Args:
            pieces: their numbers, each once; fewer than the slots.
            count: times that they must be unpinned.
            wait: for slots that others need now.

        Returns:
            The slot of each; None where there are not enough and ``wait`` is off.
        """
        with self._changed:
            slots = self._pin(pieces, count)
            while slots is None and wait:
                self._changed.wait()
                slots = self._pin(pieces, count)
            return slots

    def unpin(self, slots: Ints) -> None:
        """Undo one :meth:`pin` of slots."""
        with self._changed:
            self._pins[slots] -= 1
            self._changed.notify_all()

    def fill(self, pieces: Ints, slots: Ints) -> None:
        """Fetch those of pinned pieces that are not there, and wait for those that others fetch.

        Raises:
            Bd3lmError: as ``fetch``, or the disk refuses to take them. Another call tries again.
        """
        while True:
            with self._changed:
                mine = np.flatnonzero(self._state[slots] == EMPTY)[:FETCHED_TOGETHER]
                if not mine.size:
                    self._changed.wait_for(lambda: not (self._state[slots] == FETCHING).any())
                    if (self._state[slots] == READY).all():
                        return
                    continue
                self._state[slots[mine]] = FETCHING
            outcome = EMPTY
            try:
                contents = self._fetch(pieces[mine])
                with storage_errors(self._folder):
                    for slot, content in zip(slots[mine].tolist(), contents, strict=True):
                        self._write(slot, content)
                outcome = READY
            finally:
                with self._changed:
                    self._state[slots[mine]] = outcome
                    self._changed.notify_all()

    def read(self, slot: int, offset: int, out: memoryview) -> None:
        """Copy bytes of a pinned, filled slot.

        Raises:
            StorageError: the disk does not give them.
        """
        assert self._state[slot] == READY, "a slot is filled before it is read"
        with storage_errors(self._folder):
            count = os.preadv(self._file.fileno(), [out], slot * self._size + offset)
        if count != len(out):
            raise StorageError(f"{self._folder}: the cache of the data was cut off")

    def _write(self, slot: int, content: bytes | memoryview) -> None:
        at, rest = slot * self._size, memoryview(content)
        while rest:
            count = os.pwrite(self._file.fileno(), rest, at)
            at, rest = at + count, rest[count:]

    def _pin(self, pieces: Ints, count: int) -> Ints | None:
        slots = self._slot_of[pieces].astype(np.int64) - 1
        absent = slots < 0
        present = slots[~absent]
        self._pins[present] += count  # none of these makes room for the others
        free = self._free(int(absent.sum()))
        if free is None:
            self._pins[present] -= count
            return None
        old = self._piece_in[free]
        self._slot_of[old[old >= 0]] = 0
        self._slot_of[pieces[absent]] = free + 1
        self._piece_in[free] = pieces[absent]
        self._state[free] = EMPTY
        self._pins[free] = count
        slots[absent] = free
        return slots

    def _free(self, count: int) -> Ints | None:
        """The next slots that nobody needs, in turn; None where there are not so many."""
        found: list[Ints] = [np.zeros(0, np.int64)]
        hand, left, looked = self._hand, count, 0
        while left and looked < self.slots:
            width = min(max(2 * left, 1024), self.slots - looked)
            window = (hand + np.arange(width)) % self.slots
            free = window[self._pins[window] == 0][:left]
            found.append(free)
            left -= free.size
            looked += width
            hand = int(window[-1] if left else free[-1]) + 1
        if left:
            return None
        self._hand = hand
        return np.concatenate(found)
