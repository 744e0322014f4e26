"""A disk that loses power, or refuses the n-th operation, under the functions of `bd3lm.files`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bd3lm import files
from bd3lm.checkpoint import steps, tensors

OPERATIONS = "open write fsync close replace rename mkdir unlink ftruncate chmod fstat".split()


class Os:
    """The module `os` with a hook around each operation on files.

    Args:
        hook: called with the operation's name, its function and its arguments.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in OPERATIONS:
            return function
        return lambda *args, **options: self._hook(name, function, *args, **options)


def install(patch: pytest.MonkeyPatch, hook: Callable[..., Any]) -> None:
    """Let every operation of the package's writers go through a hook."""
    for module in (files, tensors, steps):
        patch.setattr(module, "os", Os(hook))
    save, remove = tensors.save_file, shutil.rmtree
    patch.setattr(tensors, "save_file", lambda *a, **o: hook("save_file", save, *a, **o))
    proxy = type(
        "Shutil", (), {"rmtree": staticmethod(lambda *a, **o: hook("rmtree", remove, *a, **o))}
    )
    patch.setattr(files, "shutil", proxy)
    patch.setattr(steps, "shutil", proxy)


class File:
    """An inode: its content once synced, else None."""

    def __init__(self) -> None:
        self.content: bytes | None = None


class Folder:
    """An inode: the names in it once synced."""

    def __init__(self) -> None:
        self.names: dict[str, File | Folder] = {}


class PowerCut:
    """Tracks the durable files below a folder while a program writes there.

    Durable are the content of a file at its last sync and the names in a folder at its last sync,
    no more: no rename, no removal and no byte lives on by itself. This is the least that POSIX
    gives; ext4 gives more.

    Args:
        root: of the tree; its present content is durable.
        after: called after every operation, when power could be cut.
    """

    def __init__(self, root: Path, after: Callable[[], None]) -> None:
        self.root, self._after = root, after
        self._inodes: dict[int, File | Folder] = {}
        self._open: dict[int, Path] = {}
        self.operations = 0
        self._sync_tree(root)

    def hook(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run one operation and follow it."""
        before = self._present()
        result = function(*args, **options)
        self._forget_reused(before)
        if name == "open":
            self._open[result] = Path(args[0])
        elif name == "fsync":
            self._sync(self._open[args[0]])
        if name not in ("fstat", "close"):
            self.operations += 1
            self._after()
        return result

    def image(self, out: Path, *, names_kept: bool) -> None:
        """Write the tree as it is after a cut.

        Args:
            out: a new folder.
            names_kept: whether names that were not synced lived on too, with files of no content.
        """
        if names_kept:
            self._copy_present(self.root, out)
        else:
            top = self._inodes[self.root.stat().st_ino]
            assert isinstance(top, Folder)
            self._copy(top, out)

    def _copy(self, folder: Folder, out: Path) -> None:
        out.mkdir()
        for name, inode in folder.names.items():
            if isinstance(inode, Folder):
                self._copy(inode, out / name)
            else:
                (out / name).write_bytes(inode.content or b"")

    def _copy_present(self, folder: Path, out: Path) -> None:
        out.mkdir()
        for path in folder.iterdir():
            if path.is_dir():
                self._copy_present(path, out / path.name)
            else:
                inode = self._inodes.get(path.stat().st_ino)
                content = inode.content if isinstance(inode, File) else None
                (out / path.name).write_bytes(content or b"")

    def _sync_tree(self, folder: Path) -> None:
        for path in folder.iterdir():
            if path.is_dir():
                self._sync_tree(path)
            else:
                self._sync(path)
        self._sync(folder)

    def _sync(self, path: Path) -> None:
        inode = self._inode(path)
        if isinstance(inode, Folder):
            inode.names = {child.name: self._inode(child) for child in path.iterdir()}
        else:
            inode.content = path.read_bytes()

    def _inode(self, path: Path) -> File | Folder:
        made: File | Folder = Folder() if path.is_dir() else File()
        return self._inodes.setdefault(path.stat().st_ino, made)

    def _present(self) -> set[int]:
        return {path.stat().st_ino for path in [self.root, *self.root.rglob("*")]}

    def _forget_reused(self, before: set[int]) -> None:
        """An inode that is new under a number has nothing of the one that had it before."""
        for number in self._present() - before:
            self._inodes.pop(number, None)


class Refusal:
    """Refuses the n-th operation that could be refused, and counts them.

    Args:
        at: which one, from 0; None refuses none.
        error: the system's number.
    """

    def __init__(self, at: int | None, error: int) -> None:
        self._at, self._error = at, error
        self.operations = 0

    def hook(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run one operation, or refuse it."""
        if name in ("close", "fstat", "rmtree", "ftruncate", "unlink"):  # cleaning up never fails
            return function(*args, **options)
        number, self.operations = self.operations, self.operations + 1
        if number == self._at:
            raise OSError(self._error, os.strerror(self._error))
        return function(*args, **options)
