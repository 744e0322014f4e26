"""The events of a run, for a terminal or another program."""

from __future__ import annotations

from typing import Protocol

from bd3lm.evaluate import Likelihood


class Reporter(Protocol):
    """Receive the events of a run."""

    def step(self, done: int, metrics: dict[str, float]) -> None:
        """Report an optimizer step; ``metrics`` holds the latest logged values."""

    def validation(self, step: int, result: Likelihood) -> None:
        """Report a validation."""

    def scoring(self, done: int, total: int) -> None:
        """Report progress of the last validation, in rows."""

    def note(self, message: str) -> None:
        """A sentence for the user."""


class Silent:
    """Report nothing: for ranks other than the first, and for other programs."""

    def step(self, done: int, metrics: dict[str, float]) -> None:
        """See :class:`Reporter`."""

    def validation(self, step: int, result: Likelihood) -> None:
        """See :class:`Reporter`."""

    def scoring(self, done: int, total: int) -> None:
        """See :class:`Reporter`."""

    def note(self, message: str) -> None:
        """See :class:`Reporter`."""
