"""Data sets in object storage: rows come through a local cache of bounded size, verified.

The small files of a data set (manifest, tokenizer, index, digests) are copied into the user's
cache. Of ``tokens.bin`` only the pieces that rows lie in are read, 16 KiB each, and every piece is
compared with its SHA-256 in ``digests.bin`` before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from bd3lm import _core
from bd3lm.data.remote_tokens import DIGESTS, RemoteTokens, TokenFile
from bd3lm.errors import (
    Bd3lmError,
    ConfigError,
    CorruptError,
    MissingFileError,
    NotADatasetError,
    TruncatedError,
)
from bd3lm.files import digest_file, storage_errors, write_text
from bd3lm.storage import Remote
from bd3lm.user_cache import USED, cached_copy

MANIFEST, TOKENS = "manifest.json", "tokens.bin"
CACHE_SIZE = "10GB"
"""Bytes of a data set's cache where none are given."""
COPIED_TOGETHER = 8
"""Small files that are copied at the same time."""


def open_remote(
    url: str, cache_size: int | str = CACHE_SIZE
) -> tuple[Path, _core.TokenStore, RemoteTokens]:
    """Open a data set at a URL.

    Args:
        url: of a directory made by :func:`bd3lm.data.prepare`.
        cache_size: bytes of its cache, such as ``10GB``.

    Returns:
        The directory of the local copies of its small files; the data set; the reader of its
        tokens.

    Raises:
        NotADatasetError: nothing is there, or something else, or a data set without digests of its
            pieces.
        CorruptError: a file is not the one that was prepared.
        StorageError: the storage refuses to give it.
        ConfigError: a cache that is too small.
    """
    remote = Remote(url, "data")
    content = remote.read(MANIFEST)
    if content is None:
        raise NotADatasetError(
            f"{url} holds no {MANIFEST}; copy a data set there that bd3lm-prepare made"
        )
    with cached_copy("data", hashlib.sha256(content).hexdigest()[:24]) as folder:
        for last in (False, True):
            try:
                tokens = _copied(remote, folder, content, cache_size)
                return folder, _core.TokenStore.open_absent(folder, tokens), tokens
            except Bd3lmError as error:
                if last or not isinstance(error, (CorruptError, TruncatedError)):
                    raise _of_url(error, folder, remote) from error
                _empty(folder)  # a copy may have been damaged here
    raise AssertionError("the last attempt returns or raises")


def _of_url(error: Bd3lmError, folder: Path, remote: Remote) -> Bd3lmError:
    """The same error about the data set instead of the local copies."""
    if isinstance(error, ConfigError):
        return error
    return type(error)(str(error).replace(str(folder), remote.url))


def _copied(remote: Remote, folder: Path, content: bytes, cache_size: int | str) -> RemoteTokens:
    """Copy the small files that are not here yet; returns the reader of the others."""
    if not (folder / MANIFEST).is_file():
        write_text(folder / MANIFEST, content.decode(errors="replace"))
    manifest = json.loads(_core.read_manifest(folder))
    names = [f"{shard['name']}/" for shard in manifest["shards"]] if "shards" in manifest else [""]
    files: list[tuple[str, dict[str, Any]]] = []
    with ThreadPoolExecutor(COPIED_TOGETHER) as threads:
        manifests = list(threads.map(lambda name: _manifest(remote, folder, name), names))
        if names != [""]:
            files += manifest["files"].items()
        for name, own in zip(names, manifests, strict=True):
            if own.get("pieces") is None:
                raise NotADatasetError(
                    f"{remote}/{name}{MANIFEST} names no digests of pieces, by which tokens are "
                    "verified as they come; prepare the data set again, or copy it to a disk and "
                    "give its path"
                )
            own["files"][DIGESTS] = own["pieces"]["digests"]
            files += [(name + file, own["files"][file]) for file in own["files"] if file != TOKENS]
        list(threads.map(lambda file: _copy(remote, folder, *file), files))
    sizes = {own["pieces"]["bytes"] for own in manifests}
    if len(sizes) != 1:
        raise NotADatasetError(f"{remote}: the pieces of its shards must have the same size")
    parts = [
        TokenFile(name + TOKENS, own["files"][TOKENS]["bytes"], _opened(folder / name / DIGESTS))
        for name, own in zip(names, manifests, strict=True)
    ]
    width = 4 if manifest["dtype"] == "int32" else 2
    return RemoteTokens(remote, parts, width, sizes.pop(), cache_size)


def _empty(folder: Path) -> None:
    """Remove everything but the locks."""
    with storage_errors(folder):
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in (".lock", USED):
                entry.unlink()


def _opened(file: Path) -> BinaryIO:
    with storage_errors(file):
        return file.open("rb")


def _manifest(remote: Remote, folder: Path, name: str) -> dict[str, Any]:
    """The manifest of a shard, or of the data set itself."""
    file = folder / name / MANIFEST
    if not file.is_file():
        content = remote.read(name + MANIFEST)
        if content is None:
            raise MissingFileError(f"{remote}/{name}{MANIFEST}: no such file")
        with storage_errors(file):
            file.parent.mkdir(exist_ok=True)
        write_text(file, content.decode(errors="replace"))
    return json.loads(_core.read_manifest(file.parent))


def _copy(remote: Remote, folder: Path, name: str, record: dict[str, Any]) -> None:
    """Copy a file and compare it with its digest, unless it is here."""
    file = folder / name
    present = file.is_file() and file.stat().st_size == record["bytes"]
    opened = not name.endswith(DIGESTS)  # and verified where the data set is opened
    if present and (opened or _digest_of(file, record) == record["sha256"]):
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        remote.download(name, partial)
        if _digest_of(partial, record) != record["sha256"]:
            raise CorruptError(
                f"{remote}/{name}: its SHA-256 is not the one in {MANIFEST}; copy the data set "
                "there again"
            )
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _digest_of(file: Path, record: dict[str, Any]) -> str:
    """SHA-256 of a file, or of the digests of its chunks."""
    chunk = record.get("chunk_bytes")
    with storage_errors(file):
        if chunk is None:
            return digest_file(file)
        with file.open("rb") as opened:
            chunks = iter(lambda: opened.read(chunk), b"")
            digests = b"".join(hashlib.sha256(content).digest() for content in chunks)
    return hashlib.sha256(digests).hexdigest()
