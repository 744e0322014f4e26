"""Optimizer, learning-rate schedule and weight averaging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bd3lm.config.check import check, check_number, check_whole


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning-rate schedule and weight averaging."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for everything else."""
    lr: float = 3e-4
    """AdamW learning rate."""
    matrix_lr: float = 0.02
    """Muon learning rate (unused by adamw)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decays."""
    eps: float = 1e-8
    """AdamW denominator offset."""
    weight_decay: float = 0.0
    """Decoupled weight decay of every matrix."""
    momentum: float = 0.95
    """Muon momentum (Nesterov)."""
    warmup_steps: int = 2500
    """Steps of linear warm-up."""
    decay_fraction: float = 0.0
    """Last share of the steps in which the learning rate falls linearly to zero."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    ema_decay: float = 0.9999
    """Decay of the weight average; min(decay, (1+n)/(10+n)) after n steps."""

    def __post_init__(self) -> None:
        check_number("optim.lr", self.lr, 0, interval="()")
        check_number("optim.matrix-lr", self.matrix_lr, 0, interval="()")
        check(len(self.betas) == 2, "optim.betas", self.betas, "two numbers")
        for beta in self.betas:
            check_number("optim.betas", beta, 0, 1, interval="[)")
        check_number("optim.eps", self.eps, 0, interval="()")
        check_number("optim.weight-decay", self.weight_decay, 0)
        check_number("optim.momentum", self.momentum, 0, 1, interval="[)")
        check_whole("optim.warmup-steps", self.warmup_steps, 0)
        check_number("optim.decay-fraction", self.decay_fraction, 0, 1)
        check_number("optim.grad-clip", self.grad_clip, 0, interval="()")
        check_number("optim.ema-decay", self.ema_decay, 0, 1, interval="[)")
