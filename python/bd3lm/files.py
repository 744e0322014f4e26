"""Write files so that a reader, or a power cut, meets the old content or the new, never a half.

A write is durable once the file and the directory that names it are synced (``fsync``): a rename
alone survives a crash of the process, not one of the machine.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bd3lm.errors import Bd3lmError, DiskFullError, StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise an error that names ``path`` where the system refuses to read or write.

    Raises:
        DiskFullError: the disk or the quota is full.
        StorageError: any other refusal.
    """
    try:
        yield
    except Bd3lmError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{path}: no space left on the device") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a small text file durably.

    Raises:
        DiskFullError: the disk is full; the old content stays.
        StorageError: any other refusal of the system.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        try:
            _write_synced(partial, text.encode())
            os.replace(partial, path)
            sync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise


def write_json(path: Path, value: Any) -> None:
    """Replace a file by indented JSON, as :func:`write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk, where its file system can say so."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network and FUSE file systems
            raise


def make_directory(path: Path) -> None:
    """Make a directory durably, unless it is there; its parent must exist."""
    try:
        os.mkdir(path)
    except FileExistsError:
        return
    sync_directory(path.parent)


def remove_directory(path: Path) -> None:
    """Remove a directory; a reader finds it whole or not at all."""
    removed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(path, removed)
    shutil.rmtree(removed, ignore_errors=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that gets the name ``path`` when the block ends without an error.

    The block syncs the files that it writes. A directory of that name must not exist.

    Raises:
        DiskFullError: the disk is full; nothing is left behind.
        StorageError: any other refusal of the system.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            os.mkdir(partial)
            yield partial
            sync_directory(partial)
            os.rename(partial, path)
            sync_directory(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Make a directory of a cache, and let one process at a time complete it.

    Raises:
        DiskFullError: the disk is full.
        StorageError: any other refusal of the system.
    """
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a file system without locks: each process works for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``path`` when the block ends.

    For an export, which nobody reads while it is written: ``path`` is missing for a moment, and
    the old directory is ``.NAME.removed`` until the new one is durable.

    Raises:
        DiskFullError: the disk is full; the old directory stays.
        StorageError: any other refusal of the system.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    removed = path.with_name(f".{path.name}.removed")
    fresh = path.with_name(f".{path.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with new_directory(fresh) as folder:
        yield folder
    with storage_errors(path):
        shutil.rmtree(removed, ignore_errors=True)
        with suppress(FileNotFoundError):
            os.rename(path, removed)
        os.rename(fresh, path)
        sync_directory(path.parent)
    shutil.rmtree(removed, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Append one line to a file: the whole line, or nothing.

    Raises:
        DiskFullError: no space left.
        StorageError: any other refusal of the system.
    """
    with storage_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, line.encode() + b"\n")
            except BaseException:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
