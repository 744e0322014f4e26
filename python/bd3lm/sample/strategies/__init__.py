"""Decoding strategies: which masked positions of a block a forward reveals.

A strategy is a function over a :class:`~bd3lm.sample.block.BlockDraw`. :data:`STRATEGIES` lists
them in order; the first one that applies to the settings and the system is used, and ``planned``
always applies. ``ordered.py`` holds strategies that only an argument of the sampler selects.
Self-speculation is no strategy: the sampler runs it before this choice (``speculative.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bd3lm.config import SampleConfig
from bd3lm.sample.block import BlockDraw
from bd3lm.sample.strategies.analytic import analytic
from bd3lm.sample.strategies.parallel import parallel
from bd3lm.sample.strategies.planned import planned
from bd3lm.systems import System

Strategy = Callable[[BlockDraw], Iterator[None]]
"""Fills a block and yields after each forward."""


class Entry(NamedTuple):
    """A strategy and the settings that select it."""

    applies: Callable[[SampleConfig, System], bool]
    run: Strategy


STRATEGIES: dict[str, Entry] = {
    "analytic": Entry(lambda cfg, system: system.unnormalized_scores, analytic),
    "parallel": Entry(lambda cfg, system: cfg.adaptive, parallel),
    "planned": Entry(lambda cfg, system: True, planned),
}


def choose(cfg: SampleConfig, system: System) -> Strategy:
    """The strategy that these settings select."""
    return next(entry.run for entry in STRATEGIES.values() if entry.applies(cfg, system))
