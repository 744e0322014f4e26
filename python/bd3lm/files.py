"""Writing files so that a reader meets either the old content or the new, never a half."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bd3lm.errors import DiskFullError, StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into an error that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{path}: no space left on the device; nothing was kept") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file through a temporary sibling.

    Raises:
        DiskFullError: the disk is full; the old content stays.
        StorageError: any other refusal of the system.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON as :func:`write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """A new directory that takes the place of ``path`` when the block ends without an error.

    The old directory is moved aside first; :func:`recover_directory` undoes a crash between the
    two renames.

    Raises:
        DiskFullError: the disk is full; the old directory stays.
        StorageError: any other refusal of the system.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            old = _old(path)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.rename(path, old)
            os.rename(partial, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def recover_directory(path: Path) -> None:
    """Bring back a directory that :func:`replaced_directory` had moved aside when it died."""
    if not path.exists() and _old(path).exists():
        with storage_errors(path):
            os.rename(_old(path), path)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
