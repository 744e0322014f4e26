"""Progress of a command: bars in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bd3lm.cli.summary import duration

if TYPE_CHECKING:
    from bd3lm.evaluate import Likelihood

LINES = 20
"""Lines of progress that a training run prints where there is no terminal, at most."""
QUIET_SECONDS = 60.0
"""Longest time between two of them, if there is something new."""
TIMED_STEPS = 3
"""Steps after the first that the time of a run is estimated from."""
LONG_SECONDS = 600.0
"""A run that will take longer is announced."""


def bar(console: Console, *, transient: bool = True, shown: bool = True) -> Progress:
    """A progress bar; shows nothing where there is no terminal, or where ``shown`` is off."""
    hidden = not (shown and console.is_terminal)
    return Progress(console=console, transient=transient, disable=hidden)


class RichReporter:
    """Progress of a training run; see :class:`bd3lm.training.Reporter`.

    A terminal shows a bar with loss, speed and time left, from the first step on. Elsewhere at
    most :data:`LINES` lines say the same. A closed pipe ends the lines and not the run.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._train: TaskID | None = None
        self._score: TaskID | None = None
        self._first = (0, 0.0)  # the first step seen, and when
        self._estimated = False
        self._printed = (0, 0.0)  # the last line: its step, and when

    def __enter__(self) -> RichReporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, done: int, metrics: dict[str, float]) -> None:
        """Move the bar, or print a line where the last one is old."""
        now = time.monotonic()
        detail = ""
        if metrics:
            detail = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s"
            detail += f"  MFU {metrics['mfu']:.0%}"
        if self._train is None:
            self._progress.start()
            self._train = self._progress.add_task("training", total=self._steps, detail="")
            self._first = self._printed = done, now
        self._progress.update(self._train, completed=done, detail=detail)
        left = self._seconds_left(done, now)
        if not self._estimated and left is not None and done - self._first[0] >= TIMED_STEPS:
            self._estimated = True
            self._announce(left)
        if not self._console.is_terminal and metrics:
            step, when = self._printed
            far = done - step >= max(self._steps // LINES, 1)
            if far or now - when >= QUIET_SECONDS or done == self._steps:
                self._printed = done, now
                rest = "" if left is None or done == self._steps else f"  {duration(left)} left"
                self._line(f"step {done}/{self._steps}  {detail}{rest}")

    def validation(self, step: int, result: Likelihood) -> None:
        """Print one line."""
        line = f"step {step}: validation NELBO {result.nelbo:.4f}, PPL {result.ppl:.1f}"
        if result.bpb is not None:
            line += f", {result.bpb:.3f} bits/byte"
        self._line(line + f" ({result.tokens:,} tokens, {result.estimator})")

    def scoring(self, done: int, total: int) -> None:
        """Show the bar of the last validation."""
        if self._score is None:
            self._progress.start()
            self._score = self._progress.add_task("scoring", total=total, detail="rows")
            self._printed = done, time.monotonic()
        self._progress.update(self._score, completed=done)
        if not self._console.is_terminal and time.monotonic() - self._printed[1] >= QUIET_SECONDS:
            self._printed = done, time.monotonic()
            self._line(f"scoring {done}/{total} rows")

    def note(self, message: str) -> None:
        """Print one line."""
        self._line(message)

    def _seconds_left(self, done: int, now: float) -> float | None:
        """Estimate the time to the last step from the steps after the first; None: no measure."""
        step, when = self._first
        if done == step:  # the first step also warms up
            return None
        return (now - when) / (done - step) * (self._steps - done)

    def _announce(self, left: float) -> None:
        """Say how long a long run will take."""
        if left > LONG_SECONDS:
            self._line(
                f"about {duration(left)} to the last step, by the time of the first ones; Ctrl-C "
                "saves the run, and --resume continues it"
            )

    def _line(self, text: str) -> None:
        with suppress(BrokenPipeError):
            self._console.print(text)
