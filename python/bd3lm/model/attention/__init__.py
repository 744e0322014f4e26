"""Block-diffusion attention: one mask description, several backends, one entry point."""

from bd3lm.model.attention.mask import BlockMask, CachedMask, Intervals, RangeMask
from bd3lm.model.attention.registry import AUTO, BACKENDS, Backend, attend, choose

__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "BlockMask",
    "CachedMask",
    "Intervals",
    "RangeMask",
    "attend",
    "choose",
]
