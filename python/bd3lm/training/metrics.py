"""The log of a run: ``metrics.jsonl``, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bd3lm.files import write_text


class MetricsLog:
    """Append lines to ``metrics.jsonl``.

    Args:
        file: path of the log.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, line: dict[str, Any]) -> None:
        """Add one line."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def forget_after(self, step: int) -> None:
        """Remove the lines of later steps."""
        if self.file.exists():
            lines = [line for line in self.file.read_text(encoding="utf-8").splitlines() if line]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_text(self.file, "".join(line + "\n" for line in kept))
