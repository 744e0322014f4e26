"""The user's cache: local copies of data sets and checkpoints at a URL, up to a number of bytes."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from bd3lm.files import locked_directory, storage_errors
from bd3lm.storage import parse_bytes

LIMIT, VARIABLE = "100GB", "BD3LM_CACHE_LIMIT"
"""Bytes of all copies together, and the environment variable for another number."""
KINDS = ("data", "checkpoints")
USED = ".used"
"""File of a copy whose lock its users share, and whose time is that of the last use."""
_held: dict[Path, int] = {}
"""Descriptors whose shared locks keep the copies of this process, until it ends."""


def cache_folder() -> Path:
    """Folder of this package in the user's cache: ``$XDG_CACHE_HOME/bd3lm``, or in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "bd3lm"


@contextmanager
def cached_copy(kind: Literal["data", "checkpoints"], key: str) -> Iterator[Path]:
    """Yield the folder of a copy, which one process at a time completes.

    The copy stays until this process ends. Behind the block, those that no process uses are
    removed, the one used longest ago first, until all together are within the limit.

    Raises:
        ConfigError: a limit that is no number of bytes.
        DiskFullError: the disk is full.
        StorageError: any other refusal of the system.
    """
    limit = parse_bytes(os.environ.get(VARIABLE, LIMIT), VARIABLE)
    path = cache_folder() / kind / key
    _hold(path)
    with locked_directory(path):
        yield path
    _trim(cache_folder(), limit)


def _hold(path: Path) -> None:
    """Make a folder and mark it as used by this process."""
    while not (path in _held and _is_at(_held[path], path)):
        if path in _held:
            os.close(_held.pop(path))  # the user has emptied the cache
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # it was removed in between
                descriptor = os.open(path / USED, os.O_RDWR | os.O_CREAT, 0o666)
                with suppress(OSError):  # a file system without locks: nothing is removed
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                _held[path] = descriptor
    with storage_errors(path):
        os.utime(_held[path])


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one of a folder, which may have been removed since."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path / USED))
    except FileNotFoundError:
        return False


def _trim(root: Path, limit: int) -> None:
    """Remove copies until all together have so many bytes, or all others are in use."""
    for rest in root.glob("*/.*.removed"):  # of a process that was killed meanwhile
        shutil.rmtree(rest, ignore_errors=True)
    copies = [path for kind in KINDS for path in root.glob(f"{kind}/[!.]*")]
    sizes = {path: _size(path) for path in copies}
    total, removed = sum(sizes.values()), 0
    for path in sorted(copies, key=_last_use):
        if total <= limit:
            break
        if _remove(path):
            total -= sizes[path]
            removed += 1
    if removed:
        sys.stderr.write(
            f"{root}: removed {removed} of {len(copies)} copies, those used longest ago, to stay "
            f"within {VARIABLE} ({limit / 1e9:g} GB)\n"
        )


def _size(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):  # another process removes it
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _last_use(path: Path) -> float:
    for file in (path / USED, path):
        with suppress(FileNotFoundError):
            return file.stat().st_mtime
    return 0.0


def _remove(path: Path) -> bool:
    """Remove a copy, unless a process uses it; returns whether it did."""
    with suppress(OSError):  # it is in use, or gone already
        descriptor = os.open(path / USED, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, path):
                return False
            # Whoever waits for the lock finds another folder, or none, at the path.
            gone = path.with_name(f".{path.name}.{os.getpid()}.removed")
            os.rename(path, gone)
        finally:
            os.close(descriptor)
        shutil.rmtree(gone, ignore_errors=True)
        return True
    return False
