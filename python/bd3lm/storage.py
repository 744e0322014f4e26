"""Folders at a URL, through fsspec: object storage such as ``s3://`` and ``gs://``.

Keys, regions and endpoints are fsspec's own settings (its configuration files and environment), or
those of the provider's tools. Protocols beyond those of fsspec itself need their package, such as
s3fs, which the extra ``storage`` installs.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from bd3lm.errors import (
    ConfigError,
    DiskFullError,
    MissingFileError,
    MissingPackageError,
    StorageError,
)
from bd3lm.extras import install_hint, require
from bd3lm.files import sync_file

T = TypeVar("T")

WAITS = (0.5, 2.0, 8.0)
"""Seconds before each further attempt at a request that failed."""
CONNECTIONS = 64
"""Requests at once to S3, whose own default of 10 is too few for rows."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(I)?)?B?", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(?:://|::)")


def parse_bytes(size: int | str, setting: str = "cache-size") -> int:
    """Read a number of bytes, such as ``10GB``, ``512MiB`` or ``65536``.

    Raises:
        ConfigError: it is none.
    """
    found = _SIZE.fullmatch(str(size))
    if found is None:
        raise ConfigError(setting, size, "a number of bytes, such as 10GB or 512MiB")
    number, prefix, binary = found.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def is_url(source: object) -> bool:
    """Return whether this is the URL of a file system, such as ``s3://bucket/runs/book``."""
    return isinstance(source, str) and _URL.match(source) is not None


class Remote:
    """A folder at a URL; names of files in it are relative, with slashes.

    A request that fails is repeated three times. Every method raises :class:`StorageError` where
    the storage still refuses.

    Args:
        url: of the folder, which need not exist.
        setting: name of the setting that holds it, for errors.

    Raises:
        ConfigError: a protocol that fsspec does not know.
        MissingPackageError: the package of its protocol is not installed.
    """

    def __init__(self, url: str, setting: str = "url") -> None:
        self.url = url.rstrip("/")
        core: Any = require("fsspec.core", "storage", url)
        try:
            self._fs, path = core.url_to_fs(self.url, **_options(self.url))
        except ImportError as error:
            raise MissingPackageError(f"{url}: {error}; {install_hint('storage')}") from error
        except ValueError as error:
            known = "a URL whose protocol fsspec knows, such as s3://bucket/folder"
            raise ConfigError(setting, url, known) from error
        self._path = path.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def below(self, name: str) -> Remote:
        """A folder in this one."""
        return Remote(f"{self.url}/{name}")

    def read(self, name: str) -> bytes | None:
        """Read a small file; None where there is none."""
        try:
            return self._request(name, lambda: self._fs.cat_file(self._at(name)))
        except MissingFileError:
            return None

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read parts of files, at once where the file system can do that.

        Args:
            ranges: name, first byte and the byte after the last of each part.

        Returns:
            Content of each part; shorter where the file ends before it.

        Raises:
            MissingFileError: there is no such file.
        """
        found: dict[int, bytes] = {}
        for wait in (*WAITS, None):
            left = [index for index in range(len(ranges)) if index not in found]
            paths, begins, ends = zip(*(ranges[index] for index in left), strict=True)
            paths = [self._at(name) for name in paths]
            try:
                contents = self._fs.cat_ranges(paths, [*begins], [*ends], on_error="return")
            except Exception as error:  # each protocol has its own kinds
                contents = [error] * len(left)
            failures: dict[int, Exception] = {}
            for index, content in zip(left, contents, strict=True):
                if isinstance(content, Exception):
                    failures[index] = content
                else:
                    found[index] = content
            if not failures:
                break
            index, error = next(iter(failures.items()))
            where = f"{self.url}/{ranges[index][0]}, bytes {ranges[index][1]} to {ranges[index][2]}"
            self._raise_lasting(where, error, last=wait is None)
            time.sleep(wait or 0.0)
        return [found[index] for index in range(len(ranges))]

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file directly in a folder, by name; none where there is no folder."""
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"])
            for entry in self._list(folder)
            if entry["type"] == "file" and not entry["name"].endswith("/")
        }

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly in a folder."""
        return [
            entry["name"].rstrip("/").rpartition("/")[2]
            for entry in self._list(folder)
            if entry["type"] == "directory"
        ]

    def download(self, name: str, file: Path) -> None:
        """Copy a file here and wait until it is on the disk.

        Raises:
            MissingFileError: there is no such file.
        """
        self._request(name, lambda: self._fs.get_file(self._at(name), str(file)))
        sync_file(file)

    def upload(self, file: Path, name: str) -> None:
        """Copy a file there, in place of one of that name.

        Raises:
            FileNotFoundError: the local file is not there.
        """
        size = file.stat().st_size
        self._write(name, lambda: self._fs.put_file(str(file), self._at(name)))
        stored = self._request(name, lambda: self._fs.info(self._at(name))["size"])
        if stored != size:
            raise StorageError(f"{self.url}/{name} holds {stored} bytes of {size} after an upload")

    def replace(self, name: str, content: bytes) -> None:
        """Replace a small file; a reader gets the old content or the new, never a part.

        Object storage does that by itself. The file is moved into its place for the file systems
        that do not.
        """
        fresh = f"{name}.partial"
        self._write(fresh, lambda: self._fs.pipe_file(self._at(fresh), content))
        self._request(name, lambda: self._fs.mv(self._at(fresh), self._at(name)))

    def remove(self, folder: str) -> None:
        """Remove a folder, if it is there."""
        with suppress(MissingFileError):
            self._request(folder, lambda: self._fs.rm(self._at(folder), recursive=True))

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _list(self, folder: str) -> list[dict[str, Any]]:
        try:
            return self._request(folder, lambda: self._fs.ls(self._at(folder), detail=True))
        except MissingFileError:
            return []

    def _write(self, name: str, write: Callable[[], Any]) -> None:
        """Write, after making the folder where the file system has folders and lacks this one."""
        try:
            self._request(name, write)
        except MissingFileError:
            self._make_parents(name)
            self._request(name, write)

    def _make_parents(self, name: str) -> None:
        for folder in reversed(PurePosixPath(self._at(name)).parents):
            # Below a bucket or a folder of the root, which is never made: it may be a slip.
            below = len(folder.parts) - folder.is_absolute() > 1
            path = str(folder)
            if below and not self._request(name, partial(self._fs.isdir, path)):
                self._request(name, partial(self._fs.mkdir, path, create_parents=False))

    def _request(self, name: str, request: Callable[[], T]) -> T:
        """Make a request, again where it fails for a reason that may pass."""
        where = f"{self.url}/{name}" if name else self.url
        for wait in (*WAITS, None):
            try:
                self._fs.invalidate_cache()
                return request()
            except Exception as error:  # each protocol has its own kinds
                self._raise_lasting(where, error, last=wait is None)
            time.sleep(wait or 0.0)
        raise AssertionError("the last attempt returns or raises")

    @staticmethod
    def _raise_lasting(where: str, error: Exception, *, last: bool) -> None:
        """Raise the error of a request as one of ours, unless another attempt may succeed."""
        if isinstance(error, FileNotFoundError):
            raise MissingFileError(f"{where}: no such file or folder") from error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{where}: no space left on the device") from error
        if last or isinstance(error, PermissionError):
            reason = " ".join(str(error).split())[:200] or repr(error)
            raise StorageError(f"{where}: {reason}") from error


def _options(url: str) -> dict[str, Any]:
    """Options of a file system besides those that fsspec is configured with."""
    config: Any = require("fsspec.config", "storage", url)
    named = "config_kwargs"
    if not url.startswith("s3://") or named in config.conf.get("s3", {}):
        return {}
    return {named: {"max_pool_connections": CONNECTIONS}}
