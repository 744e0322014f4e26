"""Signals that end a run: Ctrl-C, and those of schedulers, containers and closed terminals."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bd3lm.errors import InterruptedRunError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Slurm, Kubernetes and spot machines send SIGTERM (Slurm also SIGUSR1, if configured) and wait a
while; a closed terminal sends SIGHUP."""


@contextmanager
def deferred() -> Iterator[list[int]]:
    """Yield a list that gets the number of the first signal; the block decides when to stop.

    A second Ctrl-C raises :class:`KeyboardInterrupt` at once; other signals change nothing more.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    with _handlers(handle):
        yield received


@contextmanager
def immediate(message: str) -> Iterator[None]:
    """Raise :class:`InterruptedRunError` with this message at the first signal."""
    raised: list[InterruptedRunError] = []

    def handle(number: int, frame: FrameType | None) -> None:
        raised.append(InterruptedRunError(message, number))
        raise raised[-1]

    with _handlers(handle):
        try:
            yield
        except Exception as error:
            # Some libraries (FSDP's dispatch of operators) raise an error of theirs in its place.
            if raised and error is not raised[-1]:
                raise raised[-1] from error
            raise


@contextmanager
def _handlers(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install a handler, except for SIGHUP where it is ignored, as ``nohup`` has it."""
    before: dict[int, Any] = {}
    try:
        for number in SIGNALS:
            current = signal.getsignal(number)
            if number == signal.SIGHUP and current is signal.SIG_IGN:
                continue
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller owns the signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
