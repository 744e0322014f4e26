"""The log of a run: ``metrics.jsonl``, one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bd3lm.files import append_line, storage_errors, sync_file, write_text


class MetricsLog:
    """Append lines to ``metrics.jsonl``.

    Args:
        file: path of the log.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, line: dict[str, Any]) -> None:
        """Add one line, whole or not at all; NaN and infinity, which JSON lacks, become null.

        Raises:
            DiskFullError: no space left.
            StorageError: any other refusal of the system.
        """
        append_line(self.file, json.dumps(_finite(line), allow_nan=False))

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        if self.file.exists():
            with storage_errors(self.file):
                sync_file(self.file)

    def rewind(self, step: int, *, validated: bool = True) -> None:
        """Remove the lines of later steps, and damaged ones.

        Args:
            step: the last step that stays.
            validated: also keep the validation of that step.
        """
        if not self.file.exists():
            return
        kept = [
            json.dumps(line) + "\n"
            for line in read_metrics(self.file)
            if line["step"] < step
            or (line["step"] == step and (validated or "val_nelbo" not in line))
        ]
        text = "".join(kept)
        if text.encode() != self.file.read_bytes():
            write_text(self.file, text)


def read_metrics(file: Path | str) -> list[dict[str, Any]]:
    """Read the lines of a ``metrics.jsonl``.

    A crash of the machine or a full disk can leave half a line, or NUL bytes. Lines that are no
    object with a step are left out.

    Raises:
        StorageError: the system refuses to read it.
    """
    return list(_lines(Path(file)))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with storage_errors(file):
        content = file.read_bytes()
    for line in content.split(b"\n"):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and type(value.get("step")) is int:
            yield value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
