"""Find the rank that hangs: each writes its position to a store, and rank 0 reads all of them."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from bd3lm.ranks.place import Place

LOOKS = 20
"""Looks at the store within the time without progress that is allowed."""
LONGEST = 5.0
"""Seconds between two looks, at most."""
WAITING = ("torch/autograd/", "torch/distributed/", "bd3lm/ranks/")
"""Files in which a rank waits for the others."""
GRACE = 10.0
"""Seconds that the main thread has to report a lost connection itself."""
EXIT_CODE = 2
LOST = "the connection to rank 0 is lost"


class Watch:
    """A thread that ends the process when some rank hangs, after rank 0 has named it.

    A rank that waits in a collective cannot be interrupted, so the process ends without returning
    to it. Nothing is lost: checkpoints are whole at every moment.

    Args:
        place: of this process.
        store: a connection to the store that nothing else uses.
        seconds: time without progress that is allowed.
    """

    def __init__(self, place: Place, store: Any, seconds: float) -> None:
        self._place, self._store, self._seconds = place, store, seconds
        self._count, self._position = 0, "starts"
        self._looks = 0
        self._main = threading.main_thread().ident
        self._seen: dict[int, tuple[int, float]] = {}
        self._alive: dict[int, tuple[int, float]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bd3lm-ranks", daemon=True)
        self._thread.start()

    def beat(self, position: str) -> None:
        """Note progress; from the first on, a rank must note something within the time allowed."""
        self._count += 1
        self._position = position

    def rest(self) -> None:
        """Allow any time until the next note of progress."""
        self._count = 0

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout=GRACE)

    def _run(self) -> None:
        period = min(LONGEST, self._seconds / LOOKS)
        try:
            while not self._closed.wait(period):
                self._looks += 1
                place = f"{self._looks} {self._count} {self._position}, {self._where()}"
                self._store.set(f"beat/{self._place.rank}", place)
                if self._place.rank == 0:
                    self._judge()
                else:
                    self._judge_first()
                if self._store.check(["verdict"]):
                    self._end(self._store.get("verdict").decode())
        except Exception as error:  # the store is gone, and with it rank 0 or torchrun
            if not self._closed.wait(GRACE):
                self._end(f"{LOST} ({' '.join(str(error).split())[:120]})")

    def _where(self) -> str:
        """Innermost call of the main thread."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "has ended"
        code = frame.f_code
        waits = any(part in code.co_filename for part in WAITING)
        name = os.path.basename(code.co_filename)
        return f"{'waiting' if waits else 'working'} in {code.co_name} ({name}:{frame.f_lineno})"

    def _judge(self) -> None:
        """Look for ranks that have made no progress, or whose process does not run."""
        names = [f"beat/{rank}" for rank in range(self._place.size)]
        known = [rank for rank, name in enumerate(names) if self._store.check([name])]
        now, notes = time.monotonic(), {}
        for rank in known:
            looks, count, notes[rank] = self._store.get(names[rank]).decode().split(" ", 2)
            for seen, number in ((self._alive, int(looks)), (self._seen, int(count))):
                if seen.get(rank, (-1, 0.0))[0] != number:
                    seen[rank] = number, now
        silent = [r for r in known if now - self._alive[r][1] > self._seconds]
        if silent:
            self._verdict(silent, notes, "its process has ended or does not run")
            return
        begun = [rank for rank in known if self._seen[rank][0] > 0]
        if not begun or any(now - self._seen[rank][1] <= self._seconds for rank in begun):
            return
        behind = min(self._seen[rank][0] for rank in begun)
        slow = [rank for rank in begun if self._seen[rank][0] == behind]
        slow = [rank for rank in slow if ", working in " in notes[rank]] or slow
        self._verdict(slow, notes, "the others wait")

    def _judge_first(self) -> None:
        """Look whether rank 0, which looks after the others, runs."""
        if self._store.check(["beat/0"]):
            looks = int(self._store.get("beat/0").decode().split(" ", 1)[0])
            now = time.monotonic()
            if self._alive.get(0, (-1, 0.0))[0] != looks:
                self._alive[0] = looks, now
            elif now - self._alive[0][1] > self._seconds:
                self._end(f"{LOST} (it does not run)")

    def _verdict(self, ranks: list[int], notes: dict[int, str], why: str) -> None:
        named = "; ".join(f"rank {rank} {notes[rank]}" for rank in ranks)
        self._store.set("verdict", f"no progress for {self._seconds:.0f} s: {named} ({why})")

    def _end(self, sentence: str) -> None:
        """Print the verdict, once for all ranks, and end the process."""
        if self._place.rank == 0 or sentence.startswith(LOST):
            sys.stderr.write(f"error: {sentence}. Continue the run with --resume\n")
            sys.stderr.flush()
        if self._place.rank == 0:
            self._closed.wait(2 * min(LONGEST, self._seconds / LOOKS))  # the others read it first
        os._exit(EXIT_CODE)
