"""Settings to plain JSON and back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from bd3lm.config.check import check

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a config dataclass from :func:`to_dict`; unknown and missing names are errors.

    Raises:
        ConfigError: a name that the dataclass does not have, or a value it does not allow.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        check(name in known, name, values[name], f"left out: {kind.__name__} has no such setting")
    return kind(**{name: _convert(hints[name], value) for name, value in values.items()})


def changed(config: T, settings: Mapping[str, Any]) -> T:
    """Copy a config dataclass with some fields changed; a mapping changes a nested part.

    Raises:
        ConfigError: a name that the dataclass does not have, or a value it does not allow.
    """
    known = {f.name for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    values = {}
    for name, value in settings.items():
        kind = type(config).__name__
        check(name in known, name, value, f"a setting of {kind}: one of {', '.join(sorted(known))}")
        part = getattr(config, name)
        nested = dataclasses.is_dataclass(part) and isinstance(value, Mapping)
        values[name] = changed(part, value) if nested else value
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def _convert(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast("type[Any]", hint), value)
    if isinstance(value, list):
        return tuple(value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
