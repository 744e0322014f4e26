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


def from_dict(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Rebuild a config dataclass from :func:`to_dict`; a setting that is left out has its default.

    Args:
        kind: the dataclass.
        values: settings by name, from JSON that may be damaged.
        prefix: of the names in messages.

    Raises:
        ConfigError: a name that the dataclass does not have, or a value of another type or range.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        allowed = f"left out: {kind.__name__} has no such setting"
        check(name in known, prefix + name, values[name], allowed)
    return kind(**{name: _convert(hints[name], v, prefix + name) for name, v in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Check a JSON value against a type and convert it: lists to tuples, 1 to 1.0."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_dict(typing.cast("type[Any]", option), value, f"{name}.")
        if typing.get_origin(option) is tuple and isinstance(value, list):
            parts = typing.get_args(option)
            repeated = len(parts) == 2 and parts[1] is Ellipsis
            kinds = [parts[0]] * len(value) if repeated else parts
            if len(kinds) == len(value):
                pairs = enumerate(zip(kinds, value, strict=True))
                return tuple(_convert(k, v, f"{name}[{i}]") for i, (k, v) in pairs)
        if option is float and type(value) is int and abs(value) < 2**1023:
            return float(value)
        if _fits(option, value):
            return value
    check(False, name, value, " or ".join(map(_described, options)))
    raise AssertionError("unreachable")


def _fits(option: Any, value: Any) -> bool:
    if typing.get_origin(option) is typing.Literal:
        return type(value) is str and value in typing.get_args(option)
    return type(value) is option


def _described(option: Any) -> str:
    if typing.get_origin(option) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names |= {types.NoneType: "null"}
    if option in names:
        return names[option]
    return "a list" if typing.get_origin(option) is tuple else "an object"


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
