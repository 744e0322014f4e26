"""Settings of a run on disk: their paths, and those that may change when it is resumed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bd3lm.config import TrainConfig, to_dict
from bd3lm.errors import ConfigError
from bd3lm.hub import OFFLINE

RESUMABLE = (
    "data",
    "valid",
    "cache_size",
    "micro_batch",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep",
    "mirror",
    "parallel.",
)
"""Settings that may change, besides more ``steps``: no number of the run depends on them, but for
the order of sums and, with another micro-batch, the masks of dropout and the weight under
``objective.ar_tokens = unmasked``. The data may have moved, but must be the same; another number of
ranks may need another micro-batch."""


PATHS = ("data", "valid", "tokenizer", "init_from")
"""Settings that may be paths."""
NAMES = ("-", "default", OFFLINE)
"""Values of them that never are."""


def absolute_paths(cfg: TrainConfig) -> TrainConfig:
    """Make the paths of the settings absolute, so that a run is usable from any folder.

    Values that are no existing path, such as names on the hub, stay unchanged.
    """
    values = {name: getattr(cfg, name) for name in PATHS}
    paths = {
        name: os.path.abspath(value)
        for name, value in values.items()
        if value is not None and value not in NAMES and os.path.exists(value)
    }
    return replace(cfg, **paths)


def check_resumed(cfg: TrainConfig, saved: TrainConfig, source: object) -> None:
    """Refuse settings that would change the results of the run.

    Args:
        cfg: the settings to resume with.
        saved: those of the run.
        source: the run, for the message.

    Raises:
        ConfigError: names the first setting that must stay.
    """
    old, new = _flat(to_dict(absolute_paths(saved))), _flat(to_dict(absolute_paths(cfg)))
    for name, value in new.items():
        longer = name == "steps" and value >= old[name]
        if value != old[name] and not longer and not name.startswith(RESUMABLE):
            least = "at least " if name == "steps" else ""
            start = f"--init-from {shlex.quote(str(source))}"
            raise ConfigError(
                name.replace("_", "-"),
                value,
                f"{least}{old[name]}, as in the run that is resumed; for another run, "
                f"choose a new --out and start from this one with {start}",
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat
