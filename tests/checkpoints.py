"""Small checkpoints with random weights, which tests of file layouts share."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch

from bd3lm.checkpoint import Checkpoint
from bd3lm.config import preset
from bd3lm.data import load_tokenizer
from bd3lm.model import Transformer


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Pseudo-random weights by name, of a size that lets every part of the network matter."""
    x = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(zlib.crc32(name.encode()) << 16)
    x ^= x >> np.uint64(31)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(29)
    u = ((x >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0).reshape(shape)
    if len(shape) == 2:
        u *= 1.0 if "embed" in name else 1.5 * shape[1] ** -0.5
    elif "norm" in name:
        u = 1 + 0.25 * u
    else:
        u *= 0.25
    return torch.from_numpy(u.astype(np.float32))


def random_checkpoint(
    name: str,
    system: str,
    shape: dict[str, object],
    *,
    spread: float = 0.1,
    direction: float | None = None,
) -> Checkpoint:
    """Build an untrained model of a preset whose every weight, closed branches too, is random.

    Args:
        name: the preset, at L = 32.
        system: as in the settings.
        shape: changes of the model's settings.
        spread: standard deviation that is added to every initial weight.
        direction: size of a direction that all embeddings share, as training gives them; the
            embeddings are then also four times as large. None: neither.
    """
    cfg = preset(name, system, seq_len=32, model=shape)
    tokenizer = load_tokenizer("default")
    torch.manual_seed(0)
    model = Transformer(cfg.model, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
        if direction is not None:
            model.embed.weight.mul_(4).add_(direction * torch.randn(cfg.model.width))
    return Checkpoint(cfg, model, tokenizer, 0, Path("."))
