"""Stop rule for degenerate rows (docs/math.md §8)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

DEGENERATE_WINDOW = 256
DEGENERATE_NATS = 4.0


def token_entropy(ids: Sequence[int]) -> float:
    """Entropy in nats of the empirical distribution of the ids.

    Examples:
        >>> round(token_entropy([1, 1, 2, 2]), 4)
        0.6931
    """
    total = len(ids)
    return -sum(n / total * math.log(n / total) for n in Counter(ids).values())


def is_degenerate(ids: Sequence[int]) -> bool:
    """Return whether the entropy of the last 256 tokens is below 4 nats; False for shorter rows."""
    if len(ids) < DEGENERATE_WINDOW:
        return False
    return token_entropy(ids[-DEGENERATE_WINDOW:]) < DEGENERATE_NATS
