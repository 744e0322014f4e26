"""Check a setting where it is made."""

from __future__ import annotations

import math
from typing import Any

from bd3lm.errors import ConfigError

LARGEST_COUNT = 2**53
"""Largest count of a setting: every whole number up to it is a float64."""
LARGEST_FLOAT = 3.4028234663852886e38
"""Largest float32."""


def check(condition: bool, field_name: str, value: object, allowed: str) -> None:
    """Raise :class:`ConfigError`: ``field = value: must be allowed``."""
    if not condition:
        raise ConfigError(field_name, value, allowed)


def check_whole(field_name: str, value: Any, low: int, high: int = LARGEST_COUNT) -> None:
    """Check a whole number.

    Raises:
        ConfigError: it is no whole number, or outside ``[low, high]``.
    """
    allowed = f"at least {low}" if high == LARGEST_COUNT else f"in [{low}, {high}]"
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(field_name, value, f"a whole number, {allowed}")
    check(low <= value <= high, field_name, value, allowed)


def check_number(
    field_name: str, value: Any, low: float, high: float = math.inf, *, interval: str = "[]"
) -> None:
    """Check a finite number that a float32 can hold.

    Args:
        field_name: for the message.
        value: the number.
        low: its lower bound; -inf: none.
        high: its upper bound.
        interval: ``[]``, ``[)``, ``(]`` or ``()``: which bounds are allowed themselves.

    Raises:
        ConfigError: it is no number, NaN, infinite or out of range.
    """
    allowed = f"in {interval[0]}{low:g}, {high:g}{interval[1]}"
    if high == math.inf:
        allowed = f"at least {low:g}" if interval[0] == "[" else f"greater than {low:g}"
    if low == -math.inf:
        allowed = "of either sign"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
        raise ConfigError(field_name, value, f"a finite float32, {allowed}")
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[1] == "]" else value < high
    check(above and below, field_name, value, allowed)
