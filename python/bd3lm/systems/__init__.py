"""How each system trains and scores: one file a system, one table that finds it."""

from __future__ import annotations

from bd3lm.config import TrainConfig
from bd3lm.systems.base import Scorer, System
from bd3lm.systems.bd3lm import BlockDiffusion

__all__ = ["BlockDiffusion", "Scorer", "System", "build_system"]


def build_system(cfg: TrainConfig, mask_id: int, block_size: int | None = None) -> System:
    """The system a run names.

    Args:
        cfg: the run's settings.
        mask_id: id of the mask token.
        block_size: S other than the trained one, for scoring and sampling.
    """
    return BlockDiffusion(block_size or cfg.block_size, mask_id, cfg.noise)
