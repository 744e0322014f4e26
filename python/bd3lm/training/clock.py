"""Waits and memory of the steps between two lines of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bd3lm.device import peak_memory
from bd3lm.ranks.group import Ranks


class StepClock:
    """Seconds of the steps since the last line, on this rank."""

    def __init__(self) -> None:
        self._steps, self._data, self._own = 0, 0.0, 0.0
        self._began = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the wait for the batch of a step."""
        began = time.perf_counter()
        yield
        self._steps += 1
        self._data += time.perf_counter() - began

    def begin(self) -> None:
        """Note that the ranks begin a step together."""
        self._began = time.perf_counter()

    def arrive(self) -> None:
        """Note that the work before the last exchange of gradients is done."""
        self._own += time.perf_counter() - self._began

    def read(self, ranks: Ranks, device: torch.device) -> dict[str, float]:
        """Begin a new line; called on all ranks.

        Returns:
            ``data_seconds``, the mean wait of a step for its batch, and ``memory``, the peak in
            bytes, of the rank where they are largest; with several ranks also ``skew``, the
            difference of the mean seconds that the slowest and the fastest rank work in a step
            before the last exchange of gradients. On a GPU that is the time of the host.
        """
        steps = max(self._steps, 1)
        mine = self._data / steps, self._own / steps, peak_memory(device)
        self._steps, self._data, self._own = 0, 0.0, 0.0
        data, own, memory = zip(*ranks.gather(mine), strict=True)
        line = {"data_seconds": max(data), "memory": max(memory)}
        return line | ({"skew": max(own) - min(own)} if ranks.size > 1 else {})
