"""Files of the Hugging Face hub: one attempt, and one sentence where it fails."""

from __future__ import annotations

from pathlib import Path

TIMEOUT = 10.0
"""Seconds until an unreachable hub is given up."""


class HubError(Exception):
    """The hub does not give a file; the message says why."""


def download(
    repo: str, filename: str, *, kind: str = "model", revision: str | None = None
) -> Path | None:
    """Get a file of the hub, from the local cache where it is there.

    Args:
        repo: name of the repository.
        filename: path of the file in it.
        kind: ``model`` or ``dataset``.
        revision: branch or commit; None: main.

    Returns:
        The local path, or None where the repository has no such file.

    Raises:
        HubError: no network, no such repository, or no access to it.
    """
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(repo, filename, repo_type=kind, revision=revision)
    if not isinstance(cached, str):
        check_online()  # the library would try again for half a minute
    try:
        return Path(hub.hf_hub_download(repo, filename, repo_type=kind, revision=revision))
    except Exception as error:
        if type(error).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            return None  # the two names are those of its older and newer versions
        raise HubError(_reason(error)) from None


def list_files(repo: str, *, kind: str = "dataset", revision: str | None = None) -> list[str]:
    """List the files of a repository.

    Raises:
        HubError: no network, no such repository or revision, or no access to it.
    """
    import huggingface_hub as hub

    check_online()
    try:
        return list(hub.HfApi().list_repo_files(repo, repo_type=kind, revision=revision))
    except Exception as error:
        raise HubError(_reason(error)) from None


def check_online() -> None:
    """Check that the hub can be reached.

    Raises:
        HubError: it cannot, or the environment forbids to try.
    """
    from huggingface_hub import constants, utils

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, and the file is not in the local cache")
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:
        raise HubError(f"no connection to the hub: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
