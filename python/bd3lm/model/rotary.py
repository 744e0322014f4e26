"""Rotary position embedding: frequencies, their scalings, and the tables of angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bd3lm.config import RopeScaling


def frequencies(head_width: int, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Radians a position of every pair of features, and the factor of cosines and sines.

    Args:
        head_width: Dh.
        theta: base.
        scaling: how the frequencies are stretched.

    Returns:
        ``(frequencies, factor)``: float64 [Dh/2], on the CPU; the factor is 1 except for yarn.
    """
    # On the CPU even where the model is being made on another device, or on meta.
    even = torch.arange(0, head_width, 2, dtype=torch.float64, device="cpu")
    kept = 1.0 / theta ** (even / head_width)
    stretched = kept / scaling.factor
    if scaling.kind in ("none", "linear"):
        return stretched, 1.0
    assert scaling.original_length is not None
    if scaling.kind == "llama3":
        turns = scaling.original_length * kept / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1.0 - share) * stretched + share * kept, 1.0
    first, last = (
        _pair_of(beta, head_width, theta, scaling.original_length)
        for beta in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_width - 1)
    pair = torch.arange(head_width // 2, dtype=torch.float64, device="cpu")
    share = 1.0 - ((pair - first) / (last - first or 0.001)).clamp(0.0, 1.0)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0
    return (1.0 - share) * stretched + share * kept, factor


def _pair_of(rotations: float, head_width: int, theta: float, length: int) -> float:
    """Index of the frequency that rotates so many times over ``length`` positions."""
    return head_width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))


class Rotary:
    """Rotary position embedding, rotating the two halves of each head against each other.

    The tables grow on demand and are kept per device, in float32: bf16 angles lose the
    position of distant tokens. Shorter tables stay in memory too, since a recorded CUDA graph may
    read them.
    """

    def __init__(self, head_width: int, theta: float, scaling: RopeScaling | None = None) -> None:
        self.frequencies, self.factor = frequencies(head_width, theta, scaling or RopeScaling())
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._shorter: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode(False)  # kept for later calls, which may want gradients
    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [length, Dh] of positions 0 .. length-1.

        Both halves of a head have the same angles; the sine of the first half is negated, so that
        a rotation is ``x * cos + swapped(x) * sin``.
        """
        known = self._tables.get(device)
        if known is None or known[0].shape[0] < length:
            if known is not None:
                self._shorter.append(known)
            size = max(128, 1 << (length - 1).bit_length())
            position = torch.arange(size, dtype=torch.float64, device="cpu")
            angle = position[:, None] * self.frequencies
            cos, sin = (self.factor * angle.cos()).float(), (self.factor * angle.sin()).float()
            known = (torch.cat([cos, cos], 1).to(device), torch.cat([-sin, sin], 1).to(device))
            self._tables[device] = known
        return known[0][:length], known[1][:length]


def unrotated(rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the same shape that leave queries and keys as they are."""
    return torch.ones_like(rope[0]), torch.zeros_like(rope[1])
