"""Checkpoints of a run: numbered folders, and pointers to the last and the best of them.

| name in ``RUN/checkpoint/`` | content |
| --- | --- |
| ``step-00000350/`` | a complete checkpoint, never changed once it has this name |
| ``latest`` | the name of the folder to resume from, replaced atomically |
| ``best`` | the name of the folder of the best validation so far, if there were any |

A folder gets its name when all its files are on the disk, and the pointer is replaced after that.
An older folder is removed after the pointer is on the disk too. The machine may stop at any
moment: ``latest`` names a whole checkpoint. Readers rename and remove nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from bd3lm.checkpoint.record import read_bytes
from bd3lm.errors import CheckpointError, ExistsError, MissingFileError
from bd3lm.files import (
    make_directory,
    new_directory,
    remove_directory,
    storage_errors,
    write_text,
)

T = TypeVar("T")

FOLDER = "checkpoint"
"""Folder of a run's checkpoints, inside the run."""
LATEST, BEST = "latest", "best"
TRAINING = "training"
"""Name of the state that only a run that is resumed needs: a file with a suffix, or a folder."""
FILES = ("config.json", "model.safetensors", "training.safetensors", "tokenizer.json")
"""Files of one checkpoint."""
_STEP = re.compile(r"step-(\d{8,18})")
_WEIGHTS = (".safetensors", ".bin", ".index.json")


def find_checkpoint(path: Path) -> Path:
    """Find the folder of one checkpoint.

    Args:
        path: a run, its folder of checkpoints (the last one is taken), one checkpoint's folder, a
            pointer, or a file of weights inside a checkpoint.

    Raises:
        MissingFileError: there is no such file or folder.
        CheckpointError: it holds no checkpoint.
    """
    if path.is_file():
        if path.name in (LATEST, BEST):
            return _follow(path)
        if is_weights(path.name) or path.name == "config.json":
            return path.parent
        raise CheckpointError(f"{path} is not a checkpoint, which is a folder")
    if not path.is_dir():
        raise MissingFileError(f"{path}: no such checkpoint directory")
    inside = path / FOLDER
    folder = inside if inside.is_dir() else path
    if (folder / LATEST).exists():
        return _follow(folder / LATEST)
    if (folder / "config.json").exists():
        return folder
    if folder is inside or path.name == FOLDER:
        raise CheckpointError(f"{folder} holds no checkpoint yet")
    raise CheckpointError(f"{path} is not a checkpoint: it has no config.json")


def read_checkpoint(path: Path, read: Callable[[Path], T]) -> T:
    """Read a checkpoint that a run may replace meanwhile.

    Args:
        path: as for :func:`find_checkpoint`.
        read: reads the folder of one checkpoint. It is called again with the newer folder where
            the run removed the one that was being read.

    Raises:
        MissingFileError: there is no such file or folder.
        CheckpointError: it holds no checkpoint, or one that is damaged.
    """
    folder = find_checkpoint(path)
    while True:
        try:
            return read(folder)
        except (CheckpointError, MissingFileError):
            newer = find_checkpoint(path)
            if newer == folder:
                raise
            folder = newer


def run_of(checkpoint: Path) -> Path | None:
    """Find the run that a checkpoint's folder is part of; None for one that lies elsewhere."""
    for folder in (checkpoint, checkpoint.absolute().parent):
        if folder.name == FOLDER:
            return folder.parent
    return None


class StepFolders:
    """Writer of a run's checkpoints; one process at a time may hold it (the run's lock).

    Args:
        root: the run's folder of checkpoints.
        keep: how many of the last ones stay, the best one not counted.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self._held: set[str] = set()
        self._removing = threading.Lock()

    def latest(self) -> Path | None:
        """Find the folder to resume from; None where nothing was saved.

        Raises:
            CheckpointError: the pointer is damaged, or its folder is gone.
        """
        if (self.root / LATEST).exists():
            return _follow(self.root / LATEST)
        return self.root if (self.root / "config.json").exists() else None

    @contextmanager
    def new(self, step: int) -> Iterator[Path]:
        """Yield an empty folder that becomes the run's last checkpoint when the block ends.

        The block syncs the files that it writes.

        Raises:
            ExistsError: this step is the last checkpoint already.
            DiskFullError: no space left; the older checkpoints stay.
            StorageError: any other refusal of the system.
        """
        name = _name(step)
        folder = self.root / name
        if self._pointed(LATEST) == name:
            raise ExistsError(f"{folder} is the run's last checkpoint already")
        with storage_errors(self.root):
            make_directory(self.root)
            if folder.exists():  # the machine stopped before the pointer was replaced
                remove_directory(folder)
        with new_directory(folder) as partial:
            yield partial
        self.point(LATEST, step)
        self.prune(step)

    def point(self, pointer: str, step: int) -> None:
        """Let ``latest`` or ``best`` name the folder of a step, which is complete.

        Raises:
            DiskFullError: no space left; the pointer stays as it was.
            StorageError: any other refusal of the system.
        """
        write_text(self.root / pointer, _name(step) + "\n")

    @contextmanager
    def held(self, pointer: str) -> Iterator[Path | None]:
        """Yield the folder that a pointer names, which stays until the block ends.

        For another thread, while this one goes on saving. None where there is no such pointer.
        """
        with self._removing:
            name = self._pointed(pointer)
            if name is not None:
                self._held.add(name)
        try:
            yield None if name is None else self.root / name
        finally:
            self._held.discard(name or "")

    def prune(self, step: int) -> None:
        """Remove leftovers of a process that was killed, and folders beyond the number to keep.

        Args:
            step: of the last checkpoint; later folders stay.
        """
        # A later save removes the folders that cannot be removed now.
        with self._removing, suppress(OSError):
            needed = {self._pointed(LATEST), self._pointed(BEST)} | self._held
            names = sorted(os.listdir(self.root))
            steps = sorted(int(m[1]) for name in names if (m := _STEP.fullmatch(name)))
            old = [s for s in steps if s <= step][: -self.keep]
            for name in map(_name, old):
                if name not in needed:
                    remove_directory(self.root / name)
            for name in names:
                if name.startswith(".step-"):
                    shutil.rmtree(self.root / name, ignore_errors=True)
                if name in FILES and (self.root / LATEST).exists():  # of version 1
                    os.unlink(self.root / name)

    def _pointed(self, pointer: str) -> str | None:
        file = self.root / pointer
        return _target(file) if file.is_file() else None


def _follow(pointer: Path) -> Path:
    """Find the folder that a pointer names.

    Raises:
        CheckpointError: it does not name a folder of a step, or that folder is gone.
    """
    name = _target(pointer)
    while not (pointer.parent / name).is_dir():
        before, name = name, _target(pointer)  # a run may have moved on in between
        if name == before:
            raise CheckpointError(f"{pointer} names {name}, which is missing")
    return pointer.parent / name


def _target(pointer: Path) -> str:
    return step_folder(read_bytes(pointer), pointer)


def step_folder(content: bytes, source: object) -> str:
    """The folder that the content of a pointer names.

    Raises:
        CheckpointError: it names no folder of a step.
    """
    name = content.decode("ascii", "replace").removesuffix("\n")
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{source} must hold the name of a folder, such as {_name(350)}")
    return name


def step_of(folder: str) -> int | None:
    """Step in the name of a checkpoint's folder; None for another name."""
    match = _STEP.fullmatch(folder)
    return None if match is None else int(match[1])


def is_weights(name: str) -> bool:
    """Return whether a file of this name holds weights, or an index of such files."""
    return name.endswith(_WEIGHTS)


def _name(step: int) -> str:
    return f"step-{step:08d}"
