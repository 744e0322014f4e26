"""Reach the Hugging Face hub, or know at once that it cannot be reached."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

SECONDS = 5.0
"""Longest wait for a connection."""
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def connect() -> None:
    """Try the hub once; if it does not answer, let this process read its local cache alone.

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
