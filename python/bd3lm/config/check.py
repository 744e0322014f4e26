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
    """Raise :class:`ConfigError` naming the field, its value and what is allowed."""
    if not condition:
        raise ConfigError(field_name, value, allowed)


def check_whole(field_name: str, value: Any, low: int, high: int = LARGEST_COUNT) -> None:
    """Check a whole number.

    Raises:
        ConfigError: it is no whole number, or outside ``[low, high]``.
    """
    allowed = f"must be a whole number, at least {low}"
    if high != LARGEST_COUNT:
        allowed = f"must be a whole number from {low} to {high}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    check(whole and low <= value <= high, field_name, value, allowed)


def check_number(
    field_name: str, value: Any, low: float, high: float = math.inf, *, interval: str = "[]"
) -> None:
    """Check a finite number that a float32 can hold.

    Args:
        field_name: for the message.
        value: the number.
        low: its lower bound, 0 or more.
        high: its upper bound.
        interval: ``[]``, ``[)``, ``(]`` or ``()``: which bounds are allowed themselves.

    Raises:
        ConfigError: it is no number, NaN, infinite or out of range.
    """
    if high == math.inf:
        allowed = f"must be a finite number, {low:g} or more"
        if interval[0] == "(":
            allowed = f"must be a finite number greater than {low:g}"
    else:
        allowed = f"must be a number in {interval[0]}{low:g}, {high:g}{interval[1]}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
        raise ConfigError(field_name, value, allowed)
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[1] == "]" else value < high
    check(above and below, field_name, value, allowed)
