"""The directory of a run: its lock, and cleaning up after a failed start."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bd3lm.errors import CheckpointError, ExistsError, InterruptedRunError, LostRankError
from bd3lm.files import storage_errors

LOCK = ".lock"
"""Locked by the process that trains, for its life; the file itself stays and means nothing."""


def holds_run(out: Path) -> bool:
    """Return whether a run was begun in a directory."""
    return (out / "config.json").is_file()


def check_holds_run(out: Path) -> None:
    """Refuse to resume where no run was begun.

    Raises:
        CheckpointError: there is none.
    """
    if holds_run(out):
        return
    way = "give the settings of a new run, or start it without --resume"
    if _foreign(out):
        way = "empty it, and start the run without --resume"
    raise CheckpointError(f"{out} holds no run to resume (no config.json); {way}")


@contextmanager
def run_directory(out: Path, *, resume: bool) -> Iterator[None]:
    """Make the directory of a run, and hold its lock inside the block.

    Args:
        out: the directory.
        resume: take a directory that holds a run.

    Raises:
        ExistsError: it is not empty, or another process trains in it.
        StorageError: the system refuses to make or lock it.
    """
    _check_free(out, resume)
    with storage_errors(out):
        fresh = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
    with storage_errors(out / LOCK):
        lock = _lock(out)
    try:
        _check_free(out, resume)
        yield
    finally:
        if not _foreign(out):
            with suppress(OSError):  # nothing was made in it
                (out / LOCK).unlink()
            if fresh:
                with suppress(OSError):
                    out.rmdir()
        os.close(lock)


@contextmanager
def removed_on_failure(out: Path) -> Iterator[None]:
    """Empty the directory of a new run if setting up fails.

    After a signal, or where another rank has ended, it stays and can be resumed.
    """
    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt, LostRankError):
        raise
    except BaseException:
        for path in _entries(out):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                with suppress(OSError):
                    path.unlink()
        raise


def _check_free(out: Path, resume: bool) -> None:
    if holds_run(out):
        if resume:
            return
        raise ExistsError(
            f"{out} already holds a run; choose another --out, or continue it with --resume"
        )
    if out.exists() and not out.is_dir():
        raise ExistsError(f"{out} is a file; choose another --out")
    if _foreign(out):  # a run that fails to start would remove it
        raise ExistsError(f"{out} is not empty and holds no run; empty it, or choose another --out")


def _foreign(out: Path) -> list[Path]:
    """Files of a directory that are not from a run killed before it wrote its settings."""
    return [path for path in _entries(out) if path.name not in (LOCK, ".config.json.partial")]


def _entries(out: Path) -> list[Path]:
    return sorted(out.iterdir()) if out.is_dir() else []


def _lock(out: Path) -> int:
    """Take the lock; returns the descriptor that holds it.

    Raises:
        ExistsError: another process holds it.
    """
    while True:
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 100, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise ExistsError(
                f"{out} already holds a run that another process ({holder}) is training; "
                "choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                os.close(lock)
                raise
            return lock  # a file system without locks
        with suppress(FileNotFoundError):  # removed with its directory since it was opened
            if os.path.samestat(os.fstat(lock), os.stat(out / LOCK)):
                os.truncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                return lock
        os.close(lock)
        out.mkdir(parents=True, exist_ok=True)
