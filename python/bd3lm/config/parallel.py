"""Settings of sharing a model between the ranks of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bd3lm.config.check import check, check_number, check_whole


@dataclass(frozen=True)
class ParallelConfig:
    """Settings of sharing a model between ranks; read only where there are several."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank holds the whole model and adds its gradients to those of the others. fsdp:
    weights, gradients and the optimizer's state are cut into a shard a rank (FSDP2)."""
    replicas: int = 1
    """fsdp: copies of the model, each cut into shards over ranks / replicas ranks (HSDP). The
    number of machines keeps the shards of a copy on one machine."""
    offload: bool = False
    """fsdp: keep shards and optimizer state in the memory of the host, and update there."""
    timeout_minutes: float = 30.0
    """A rank that makes no progress for so long is named, and the job ends."""

    def __post_init__(self) -> None:
        check_whole("parallel.replicas", self.replicas, 1)
        check_number("parallel.timeout-minutes", self.timeout_minutes, 0, interval="()")
        ddp, allowed = self.strategy == "ddp", "with parallel.strategy = ddp; it goes with fsdp"
        check(self.replicas == 1 or not ddp, "parallel.replicas", self.replicas, f"1 {allowed}")
        check(not (self.offload and ddp), "parallel.offload", self.offload, f"False {allowed}")
