"""What the person at the terminal sees of a run."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bd3lm.evaluate import Likelihood


class RichReporter:
    """A progress bar with loss, speed and time left; plain lines where there is no terminal."""

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._train = self._progress.add_task(
            "training", total=steps, completed=done, detail="", start=False
        )
        self._steps = steps
        self._score: object = None

    def __enter__(self) -> RichReporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, done: int, metrics: dict[str, float]) -> None:
        """Move the bar; without a terminal, a line every tenth of the way."""
        detail = ""
        if metrics:
            detail = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s"
            detail += f"  MFU {metrics['mfu']:.0%}"
        self._progress.start_task(self._train)
        self._progress.update(self._train, completed=done, detail=detail)
        if not self._console.is_terminal and done % max(self._steps // 10, 1) == 0:
            self._console.print(f"step {done}/{self._steps}  {detail}")

    def validation(self, step: int, result: Likelihood) -> None:
        """One line."""
        line = f"step {step}: validation NELBO {result.nelbo:.4f}, PPL {result.ppl:.1f}"
        if result.bpb is not None:
            line += f", {result.bpb:.3f} bits/byte"
        self._console.print(line + f" ({result.tokens:,} tokens, {result.estimator})")

    def scoring(self, done: int, total: int) -> None:
        """The bar of the last validation."""
        if self._score is None:
            self._score = self._progress.add_task("scoring", total=total, detail="rows")
        self._progress.update(self._score, completed=done)  # type: ignore[arg-type]

    def note(self, message: str) -> None:
        """One line."""
        self._console.print(message)
