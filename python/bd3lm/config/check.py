"""Check a setting where it is made."""

from __future__ import annotations

from bd3lm.errors import ConfigError


def check(condition: bool, field_name: str, value: object, allowed: str) -> None:
    """Raise :class:`ConfigError`: ``field = value: must be allowed``."""
    if not condition:
        raise ConfigError(field_name, value, allowed)
