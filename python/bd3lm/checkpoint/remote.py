"""Checkpoints at a URL: found there, downloaded into the user's cache, and opened from it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from bd3lm.checkpoint.record import Record, parse_json
from bd3lm.checkpoint.steps import BEST, FOLDER, LATEST, TRAINING, is_weights, step_folder
from bd3lm.errors import CheckpointError, MissingFileError
from bd3lm.files import digest_file, storage_errors, write_text
from bd3lm.storage import Remote
from bd3lm.user_cache import cached_copy

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def local_copy(url: str, *, training: bool = False) -> Path:
    """Download a checkpoint into the user's cache, unless it is there.

    A checkpoint never changes, so the copy is kept under the digest of its URL and its
    ``config.json``. Files are compared with the digests in that.

    Args:
        url: as :func:`bd3lm.checkpoint.steps.find_checkpoint` takes a path.
        training: also the state that a run is resumed from.

    Returns:
        A folder with the checkpoint's files.

    Raises:
        MissingFileError: nothing is there.
        CheckpointError: it is no checkpoint, or damaged.
        StorageError: the storage refuses to give it.
    """
    remote = find_remote(url)
    while True:
        try:
            return _cached(remote, training=training)
        except (CheckpointError, MissingFileError):
            newer = find_remote(url)  # a run may have removed the one that was read
            if newer.url == remote.url:
                raise
            remote = newer


def find_remote(url: str) -> Remote:
    """Find the folder of one checkpoint, as :func:`bd3lm.checkpoint.steps.find_checkpoint` does.

    Raises:
        MissingFileError: nothing is there.
        CheckpointError: it holds no checkpoint.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    if name in (LATEST, BEST):
        return _follow(Remote(parent), name)
    if is_weights(name) or name == CONFIG:
        return Remote(parent)
    remote = Remote(url)
    for folder in (remote.below(FOLDER), remote):
        if folder.read(LATEST) is not None:
            return _follow(folder, LATEST)
    if CONFIG in remote.sizes():
        return remote
    if remote.sizes() or remote.folders():
        raise CheckpointError(f"{url} is not a checkpoint: it has no config.json")
    raise MissingFileError(f"{url}: no such checkpoint")


def pointed(folder: Remote, pointer: str) -> str | None:
    """Name of the folder that a pointer names; None where there is no pointer.

    Raises:
        CheckpointError: it holds something else.
    """
    content = folder.read(pointer)
    return None if content is None else step_folder(content, f"{folder}/{pointer}")


def download_checkpoint(remote: Remote, folder: Path, *, training: bool = True) -> None:
    """Download the files of a checkpoint that a folder lacks, and compare them with their digests.

    Args:
        remote: the checkpoint's folder.
        folder: the local one, which exists; its ``config.json`` is written last.
        training: also the state that a run is resumed from.

    Raises:
        MissingFileError: a file was removed meanwhile.
        CheckpointError: no checkpoint, or damaged.
    """
    content = remote.read(CONFIG)
    if content is None:
        raise CheckpointError(f"{remote}/{CONFIG} is missing from the checkpoint")
    meta = Record(parse_json(content, f"{remote}/{CONFIG}"), f"{remote}/{CONFIG}")
    found = {*remote.sizes(), *(f"{TRAINING}/{name}" for name in remote.sizes(TRAINING))}
    digests: dict[str, str | None] = {
        name: None for name in found if is_weights(name) or name == TOKENIZER
    }
    if "files" in meta.values:  # our own layout
        files = meta.record("files")
        digests = {name: files.record(name).text("sha256") for name in files.values}
    for name, digest in digests.items():
        if (name.startswith(TRAINING) and not training) or (folder / name).is_file():
            continue
        if name not in found:
            raise CheckpointError(f"{remote}/{name} is missing from the checkpoint")
        _download(remote, name, folder / name, digest)
    write_text(folder / CONFIG, content.decode())


def _download(remote: Remote, name: str, file: Path, digest: str | None) -> None:
    """Download one file, and compare it with its SHA-256 where that is known."""
    with storage_errors(file):
        file.parent.mkdir(exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        remote.download(name, partial)
        if digest is not None and digest_file(partial) != digest:
            raise CheckpointError(
                f"{remote}/{name} is damaged: its SHA-256 is not that in its config.json"
            )
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _follow(folder: Remote, pointer: str) -> Remote:
    name = pointed(folder, pointer)
    if name is None:
        raise MissingFileError(f"{folder}/{pointer}: no such checkpoint")
    return folder.below(name)


def _cached(remote: Remote, *, training: bool) -> Path:
    """Complete the copy of one checkpoint."""
    content = remote.read(CONFIG) or b""
    key = hashlib.sha256(remote.url.encode() + b"\n" + content).hexdigest()[:24]
    with cached_copy("checkpoints", key) as target:
        download_checkpoint(remote, target, training=training)
    return target
