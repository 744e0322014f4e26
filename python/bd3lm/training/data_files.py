"""Files of the data sets that a run reads: their digest, and a watch over them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from bd3lm.data import Dataset
from bd3lm.errors import CorruptError

FILES = ("tokens.bin", "tokens.idx")
"""Files of a data set that stay mapped."""


def digest_of(data: Dataset) -> str | None:
    """SHA-256 over the digests of a data set's files; None where it is not on disk."""
    text = getattr(data.core, "manifest", None)
    if not text:
        return None
    files = json.loads(text)["files"]
    lines = "".join(f"{files[name]['sha256']}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


class DataWatch:
    """Notices when the files of a data set change while they are mapped.

    Args:
        data: the data sets.
    """

    def __init__(self, *data: Dataset) -> None:
        folders = [Path(d.path) for d in data if hasattr(d, "path")]
        folders = [part for folder in folders for part in (folder, *folder.glob("shard-*"))]
        files = [folder / name for folder in folders for name in FILES]
        files = [file for file in files if file.exists()]
        self._seen = {file: _signature(file) for file in files}

    def check(self) -> list[Path]:
        """Look at every file once; returns those that are no longer there.

        A file that was removed or replaced by another is still mapped, and read, as it was.

        Raises:
            CorruptError: a file was written to in place: steps since may be of other text.
        """
        gone: list[Path] = []
        for file, before in list(self._seen.items()):
            now = _signature(file)
            if now is None or before is None or now[0] != before[0]:
                gone.append(file)
                del self._seen[file]
            elif now != before:
                raise CorruptError(
                    f"{file} was changed while the run read it ({before[1]} bytes, now {now[1]})"
                )
        return gone


def _signature(file: Path) -> tuple[tuple[int, int], int, int] | None:
    """Identity, size and time of a file; None where it is not there."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return (found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns
