"""Packages that only some features need, and how to install them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from bd3lm.errors import MissingPackageError


def install_hint(extra: str) -> str:
    """The command that installs an extra, from the package index and from a checkout."""
    return f"pip install 'bd3lm[{extra}]' (from a checkout: pip install '.[{extra}]')"


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import a package of an extra.

    Args:
        package: its import name.
        extra: of pyproject.toml, that lists it.
        purpose: beginning of the error's sentence, the caller's name.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        hint = install_hint(extra)
        raise MissingPackageError(f"{purpose} needs the package {package}: {hint}") from error
