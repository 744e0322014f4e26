"""Low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass

from bd3lm.config.check import check, check_number, check_whole
from bd3lm.config.names import AdaptedName


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA), trained in place of the weights; needs the extra lora."""

    rank: int = 0
    """Rank of the adapters. 0: none, and all weights are trained."""
    alpha: float = 16.0
    """The product of an adapter's two matrices is scaled by alpha / rank."""
    targets: tuple[AdaptedName, ...] = ("qkv", "out", "mlp.up", "mlp.down")
    """Matrices of each block that have an adapter."""

    def __post_init__(self) -> None:
        check_whole("lora.rank", self.rank, 0, 1 << 16)
        check_number("lora.alpha", self.alpha, 0, interval="()")
        check(len(self.targets) > 0, "lora.targets", self.targets, "at least one matrix")
