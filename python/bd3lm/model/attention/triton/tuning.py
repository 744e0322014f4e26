"""Tile sizes, warps and stages of every kernel, read from ``tuning.json`` next to this file.

The table maps architecture, kernel and head width to a :class:`Tiles`. A file of the same
form named by the environment variable ``BD3LM_ATTENTION_TUNING`` replaces the entries it holds.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from bd3lm.errors import ConfigError

Kernel = Literal["forward", "keys", "queries", "decode"]
OVERRIDE = "BD3LM_ATTENTION_TUNING"


class Tiles(NamedTuple):
    """Launch parameters of one kernel."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int


@cache
def tables() -> dict[str, dict[str, dict[str, list[int]]]]:
    """The shipped table, with the user's entries over it.

    Raises:
        ConfigError: the file named by the environment cannot be read as such a table.
    """
    table = json.loads(Path(__file__).with_name("tuning.json").read_text())
    path = os.environ.get(OVERRIDE)
    if path is None:
        return table
    try:
        for arch, kernels in json.loads(Path(path).read_text()).items():
            for kernel, widths in kernels.items():
                own = {width: list(Tiles(*map(int, tiles))) for width, tiles in widths.items()}
                table.setdefault(arch, {}).setdefault(kernel, {}).update(own)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(OVERRIDE, path, f"a JSON table as tuning.json ({error})") from error
    return table


def architecture(capability: tuple[int, int]) -> str:
    """The table of a compute capability: its own, or one whose limits are no wider.

    Raises:
        ConfigError: older than sm_80, which has no bf16 tensor cores.
    """
    major, minor = capability
    own = f"sm_{major}{minor}"
    if own in tables():
        return own
    if major < 8:
        raise ConfigError("compute capability", f"{major}.{minor}", "8.0 or newer")
    # sm_90 and sm_10x hold 227 KiB of shared memory a block, sm_80 163, all others 99.
    return "sm_80" if major in (9, 10) or own == "sm_87" else "sm_89"


def tiles(kernel: Kernel, arch: str, width: int, wide: bool) -> Tiles:
    """The launch of one kernel.

    Args:
        kernel: which one.
        arch: a key of the table, as :func:`architecture` gives.
        width: D, up to 256; one without an entry takes that of the next power of two.
        wide: float32 operands, which take twice the memory of the 16-bit ones tuned for.
    """
    entries = tables()[arch][kernel]
    padded = max(32, 1 << (width - 1).bit_length())
    entry = Tiles(*entries.get(str(width), entries[str(padded)]))
    if not wide:
        return entry
    return Tiles(max(16, entry.block_m // 4), max(16, entry.block_n // 4), 4, 1)
