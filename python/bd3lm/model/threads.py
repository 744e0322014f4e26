"""Threads of the Rust kernels: those of PyTorch's OpenMP runtime.

That runtime's threads spin for milliseconds after a parallel operation, so a second thread pool
would get half a core. The kernels therefore run on the OpenMP team if the process has one.

Spinning is right on a quiet machine and ruinous on a busy one: the thread that waits takes the
core from the thread that it waits for. :func:`adaptive_waiting` switches between the two.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from bd3lm import _core

PERIOD = 1.0
"""Seconds between two looks at the scheduler."""
BUSY = 0.10
"""Seconds a second that threads of this process wait for a core, above which others need it."""
QUIET = 0.03
"""The same, below which nobody else does."""
CALM_PERIODS = 3
"""Quiet periods in a row before waiting threads spin again."""


def kernel_threads() -> int:
    """Number of threads of a kernel: as many as PyTorch's operations use."""
    return torch.get_num_threads()


def _share_threads() -> None:
    # PyTorch loads its OpenMP runtime with global visibility.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    address = None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p).value
    if address is not None:
        _core.use_openmp(address)


_share_threads()


@contextmanager
def adaptive_waiting() -> Iterator[None]:
    """Let waiting OpenMP threads sleep while other processes need the cores.

    A background thread reads once a second how long the threads of this process were runnable
    without a core (Linux; elsewhere nothing is done). Nested uses share one such thread.
    """
    with _LOCK:
        _State.users += 1
        if _State.users == 1 and _TASKS.is_dir():
            watch = Watch()
            with suppress(RuntimeError):  # no memory for one more thread: the work matters more
                watch.start()
                _State.watch = watch
    try:
        yield
    finally:
        with _LOCK:
            _State.users -= 1
            if _State.users == 0 and _State.watch is not None:
                _State.watch.end()
                _State.watch = None


class Watch(threading.Thread):
    """Switches the way threads wait, by the time they spend waiting for a core."""

    def __init__(self, period: float = PERIOD) -> None:
        super().__init__(name="bd3lm-watch", daemon=True)
        self.period = period
        self.ballast: Ballast | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        """Look at the scheduler once a period, until :meth:`end`."""
        before, then, calm = run_delays(), time.monotonic(), 0
        while not self._ended.wait(self.period):
            after, now = run_delays(), time.monotonic()
            waited = sum(max(after[task] - before.get(task, 0.0), 0.0) for task in after)
            share = waited / max(now - then, 1e-9)
            before, then = after, now
            if self.ballast is None:
                if share > BUSY:
                    self.ballast, calm = Ballast(), 0
                continue
            calm = calm + 1 if share < QUIET else 0
            if calm >= CALM_PERIODS:
                self._release()
        self._release()

    def _release(self) -> None:
        if self.ballast is not None:
            self.ballast.release()
            self.ballast = None

    def end(self) -> None:
        """Stop looking; waiting threads spin again."""
        self._ended.set()


class Ballast:
    """Idle OpenMP teams that make the runtime count more threads than there are cores.

    libgomp then lets waiting threads spin for about a microsecond before they sleep, instead of
    milliseconds. Its environment variables set the same, but only before the process starts.
    """

    def __init__(self) -> None:
        self._released = threading.Event()
        team = torch.get_num_threads()
        # The main team has `team` threads already; each further one adds all but its first.
        teams = 0 if team < 2 else -(-(_cores() - team + 1) // (team - 1))
        started: list[threading.Event] = []
        with suppress(RuntimeError):  # no more threads to be had
            for _ in range(teams):
                event = threading.Event()
                threading.Thread(target=self._hold, args=(event,), daemon=True).start()
                started.append(event)
        for event in started:
            event.wait()

    def _hold(self, started: threading.Event) -> None:
        try:
            torch.ones(1 << 20).add_(1.0)  # large enough to open a team of this thread's own
        finally:
            started.set()
        self._released.wait()

    def release(self) -> None:
        """End the threads, and their teams with them."""
        self._released.set()


class _State:
    users = 0
    watch: Watch | None = None


_LOCK = threading.Lock()
_TASKS = Path("/proc/self/task")


def run_delays() -> dict[str, float]:
    """Seconds that each thread of this process has been runnable without a core."""
    found = {}
    for task in _TASKS.iterdir():
        try:
            found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):  # a thread that ended, or a kernel without it
            continue
    return found


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))
