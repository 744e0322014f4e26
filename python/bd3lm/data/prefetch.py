"""Batches made by a thread while the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from bd3lm.data.noise import NoiseSpec
from bd3lm.data.remote_tokens import Ahead
from bd3lm.data.rows import Batch, Loader

AHEAD = 2
"""Steps that are made ahead of the current one."""
FETCHED_AHEAD = 16
"""Steps whose rows are fetched from object storage ahead of the one that is made, where the cache
has room for them."""


class _Made(NamedTuple):
    step: int
    spec: NoiseSpec
    batches: Future[list[Batch]]


class Prefetcher:
    """Prefetches the batches of the next steps in a background thread.

    A batch is a function of (seed, step, noise), so a prefetched batch is the same, bit for bit.
    One made with noise that was replaced meanwhile is thrown away. Rows in object storage are
    fetched some steps before their batch is made. The work is done in Rust without
    the interpreter's lock, by one thread that starts with the first batch and ends with
    :meth:`close`.

    Args:
        loader: makes the batches.
        steps: of the run; later ones are made only on request.
        parts: micro-batches of a step.
        on_start: called in the thread before its first batch, or None. A thread has a current
            CUDA device of its own, and page-locked memory belongs to that device.
        rank: ``(index, number)`` of the rank: of each micro-batch, which is a run of consecutive
            rows of the global batch, a rank makes its share.
    """

    def __init__(
        self,
        loader: Loader,
        steps: int,
        parts: int = 1,
        on_start: Callable[[], None] | None = None,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        self._loader, self._steps = loader, steps
        index, ranks = rank
        self._parts = [(i * ranks + index, parts * ranks) for i in range(parts)]
        self._on_start = on_start
        self._made: deque[_Made] = deque()
        self._fetching: deque[tuple[int, list[Ahead]]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def get(self, step: int, noise: Callable[[int], NoiseSpec]) -> list[Batch]:
        """Get the parts of one step's batch, and begin the next steps with their present noise.

        Args:
            step: from 0.
            noise: of each step; the same object as long as it does not change.

        Raises:
            ConfigError: noise that these rows do not allow.
        """
        spec = noise(step)
        while self._made and (self._made[0].step != step or self._made[0].spec is not spec):
            self._made.popleft().batches.cancel()
        if not self._made:
            self._begin(step, spec)
        wanted = self._made.popleft()
        after = self._made[-1].step if self._made else step
        for later in range(after + 1, min(step + AHEAD, self._steps - 1) + 1):
            self._begin(later, noise(later))
        return wanted.batches.result()

    def close(self) -> None:
        """Drop the prefetched batches and end the thread; waits for its current batch."""
        self._made.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._release(self._steps)

    def _begin(self, step: int, spec: NoiseSpec) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(
                1, thread_name_prefix="bd3lm-prefetch", initializer=self._on_start
            )
        self._made.append(_Made(step, spec, self._thread.submit(self._make, step, spec)))

    def _make(self, step: int, spec: NoiseSpec) -> list[Batch]:
        if self._loader.rows.are_remote:
            self._fetch_ahead(step)
        return [self._loader.batch(step, spec, part=part) for part in self._parts]

    def _fetch_ahead(self, step: int) -> None:
        """Begin to fetch the rows of the next steps; those before ``step`` were read."""
        if self._fetching and self._fetching[0][0] > step:  # the run went back
            self._release(self._steps)
        self._release(step)
        first = self._fetching[-1][0] + 1 if self._fetching else step
        for later in range(first, min(step + FETCHED_AHEAD, self._steps - 1) + 1):
            parts = [self._loader.fetch_ahead(later, part) for part in self._parts]
            begun = [part for part in parts if part is not None]
            if len(begun) < len(parts):  # no room yet
                for part in begun:
                    part.release()
                break
            self._fetching.append((later, begun))

    def _release(self, step: int) -> None:
        """Give back the room of rows of the steps before this one."""
        while self._fetching and self._fetching[0][0] < step:
            for part in self._fetching.popleft()[1]:
                part.release()
