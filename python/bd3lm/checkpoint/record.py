"""Read JSON that may be damaged: each fault is one sentence that names the file and the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from bd3lm.errors import CheckpointError

LARGEST_JSON = 64 << 20
"""Bytes of the largest JSON file that is read."""


class Record:
    """A JSON object whose fields are read by name and type.

    Args:
        values: the object.
        source: where it comes from, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: object) -> None:
        self.values, self.source = values, source

    def integer(self, name: str, low: int = 0, high: int = 2**63 - 1) -> int:
        """Read a whole number in ``[low, high]``.

        Raises:
            CheckpointError: it is missing, of another type or out of range.
        """
        value = self._get(name)
        if type(value) is not int or not low <= value <= high:
            self._refuse(name, value, f"must be a whole number from {low} to {high}")
        return value

    def number(self, name: str) -> float:
        """Read a finite number that is not negative.

        Raises:
            CheckpointError: it is missing, of another type or out of range.
        """
        value = self._get(name)
        if type(value) not in (int, float) or not 0 <= value < 2.0**1023:
            self._refuse(name, value, "must be a finite number, 0 or more")
        return float(value)

    def floating(self, name: str) -> float:
        """Read a finite number of either sign.

        Raises:
            CheckpointError: it is missing, of another type or not finite.
        """
        value = self._get(name)
        if type(value) not in (int, float) or not abs(value) < 2.0**1023:
            self._refuse(name, value, "must be a finite number")
        return float(value)

    def integers(self, name: str, length: int) -> list[int]:
        """Read a list of whole numbers that fit 63 bits.

        Raises:
            CheckpointError: it is missing, of another type or length.
        """
        value = self._get(name)
        whole = isinstance(value, list) and all(type(v) is int and abs(v) < 2**63 for v in value)
        if not whole or len(value) != length:
            self._refuse(name, value, f"must be a list of {length} whole numbers")
        return value

    def floats(self, name: str, length: int) -> list[float]:
        """Read a list of finite numbers.

        Raises:
            CheckpointError: it is missing, of another type or length, or not finite.
        """
        value = self._get(name)
        finite = isinstance(value, list) and all(
            type(v) in (int, float) and abs(v) < 2.0**1023 for v in value
        )
        if not finite or len(value) != length:
            self._refuse(name, value, f"must be a list of {length} finite numbers")
        return [float(v) for v in value]

    def text(self, name: str) -> str:
        """Read a string.

        Raises:
            CheckpointError: it is missing or of another type.
        """
        value = self._get(name)
        if not isinstance(value, str):
            self._refuse(name, value, "must be a string")
        return value

    def record(self, name: str) -> Record:
        """Read an object.

        Raises:
            CheckpointError: it is missing or of another type.
        """
        value = self._get(name)
        if not isinstance(value, dict):
            self._refuse(name, value, "must be an object")
        return Record(value, f"{self.source}: {name}")

    def _get(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.source} has no field {name}")
        return self.values[name]

    def _refuse(self, name: str, value: object, needed: str) -> NoReturn:
        shown = str(value)
        shown = shown if len(shown) <= 40 else shown[:40] + "..."
        raise CheckpointError(f"{self.source}: {name} = {shown} {needed}")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: no regular file, too large, or anything but a JSON object.
    """
    return parse_json(read_bytes(file), file)


def read_bytes(file: Path) -> bytes:
    """Read a small file as a whole.

    Raises:
        CheckpointError: it is missing, no regular file, too large or cannot be read.
    """
    check_regular(file)
    try:
        size = file.stat().st_size
        if size > LARGEST_JSON:
            raise CheckpointError(f"{file} has {size} bytes; at most {LARGEST_JSON} are read")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def parse_json(content: bytes, source: object) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: it is not valid JSON, or no object.
    """
    try:
        value = json.loads(content.decode(), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise CheckpointError(f"{source} is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} is not a JSON object")
    return value


def check_regular(file: Path) -> None:
    """Refuse anything but a regular file: opening a pipe or a device can wait for ever.

    Raises:
        CheckpointError: it is missing, or a folder, pipe or device.
    """
    if not file.is_file():
        fault = "is not a regular file" if file.exists() else "is missing from the checkpoint"
        raise CheckpointError(f"{file} {fault}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
