"""Write one checkpoint at a time, in a thread while the device trains, or at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

NOTHING = -1
"""Step of a run that has saved nothing."""


class Saver:
    """Writes checkpoints.

    Args:
        background: write in a thread. On a CPU that would take cores and memory from training.

    Attributes:
        saved: step of the last checkpoint that is on the disk.
        begun: step of the last one that was begun.
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self.saved = self.begun = NOTHING
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Return whether writing ended with an error, which :meth:`wait` raises."""
        return self._failure is not None

    def start(self, step: int, write: Callable[[], None]) -> None:
        """Begin to write a checkpoint; none may be in progress. :meth:`wait` raises its error.

        Args:
            step: of the checkpoint.
            write: writes it; in the background from copies that nobody changes.
        """

        def work() -> None:
            try:
                write()
                self.saved = step
            except BaseException as error:
                self._failure = error

        self.begun = step
        if not self.background:
            work()
            return
        # A process that ends at once leaves a checkpoint without a name, as a kill does.
        self._thread = threading.Thread(target=work, name="bd3lm-save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no checkpoint is in progress.

        Raises:
            Exception: the last one was not written; raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            self.begun = self.saved
            raise failure
