"""Callbacks of a run: programs that follow its metrics, such as the loggers of ``--log``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunStart:
    """A run that begins or continues."""

    out: Path
    """Directory of the run."""
    config: Mapping[str, Any]
    """Settings, as in ``config.json``."""
    step: int
    """Optimizer steps that are done."""


class Callback:
    """Follow a run. Override what is needed; every method does nothing.

    The methods are called on rank 0, between optimizer steps. Values are those of a line of
    ``metrics.jsonl``, which is written first. An exception removes the callback and is reported
    once; the run continues.
    """

    def start(self, run: RunStart) -> None:
        """Called before the first step of this process."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Called for every line of ``metrics.jsonl``.

        Args:
            step: optimizer steps that are done.
            values: fields of the line, without its step: those of training (``loss``, in nats a
                noisable token, ``lr``, ``grad_norm``, ``tokens_per_second``, ``mfu``, ``seconds``,
                ``data_seconds``, ``memory``, ``skew``), those of a validation (``val_nelbo``,
                ``val_ppl``, ``val_bpb``), or ``rewound_from``, the step from which a run that
                diverged went back.
        """

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Called once at the end.

        Args:
            summary: content of ``summary.json``; None where the run was stopped or failed.
        """


class Callbacks:
    """Several callbacks, of which one that fails is removed.

    Args:
        callbacks: called in this order.
        note: receives one sentence for each that fails.
    """

    def __init__(self, callbacks: Iterable[Callback], note: Callable[[str], None]) -> None:
        self._callbacks, self._note = list(callbacks), note

    @contextmanager
    def following(self, run: RunStart) -> Iterator[dict[str, Any]]:
        """Start, and end however the run ends; the summary is put into the dictionary."""
        summary: dict[str, Any] = {}
        self._each(lambda callback: callback.start(run))
        try:
            yield summary
        finally:
            self._each(lambda callback: callback.end(summary or None))

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass on a line of ``metrics.jsonl``."""
        values = {name: value for name, value in line.items() if name != "step"}
        self._each(lambda callback: callback.log(line["step"], values))

    def _each(self, call: Callable[[Callback], None]) -> None:
        for callback in list(self._callbacks):
            try:
                call(callback)
            except Exception as error:
                self._callbacks.remove(callback)
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                self._note(f"{type(callback).__name__} failed ({reason}); the run continues")
