"""Memory of training, before the first step."""

from __future__ import annotations

from typing import NamedTuple

from bd3lm.config import TrainConfig
from bd3lm.model.transformer import Transformer

KEPT_WIDTHS, KEPT_HIDDEN = 9.0, 2.0
"""Numbers that a layer keeps of each position for its backward pass, as multiples of the width and
of the MLP's hidden width; fitted to the peak of resident memory on a CPU."""


class Memory(NamedTuple):
    """Estimated bytes of a training run, by what they hold.

    Attributes:
        weights: the parameters, their gradients and their average.
        optimizer: its state.
        activations: kept for the backward pass of one forward.
    """

    weights: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def training_memory(cfg: TrainConfig, model: Transformer, item: int = 4) -> Memory:
    """Estimate the memory of a training step, to within a factor of about 1.5.

    The interpreter and its libraries (0.3 to 0.7 GB) and the data, which is mapped, are left out,
    and so are the logits, which never exist for all positions at once.

    Args:
        cfg: the run.
        model: its model, in float32.
        item: bytes of an activation.
    """
    sizes = [(name, p.numel(), p.ndim) for name, p in model.named_parameters()]
    parameters = sum(size for _, size, _ in sizes)
    muon = cfg.optim.optimizer == "muon"
    matrices = sum(n for name, n, ndim in sizes if muon and ndim == 2 and name.startswith("blocks"))
    shape, length, block = cfg.model, cfg.seq_len, cfg.block
    clean = length - block if cfg.system == "bd3lm" and block < length else 0
    rows = cfg.micro_batch or cfg.batch_size
    layer = shape.width if cfg.recompute else KEPT_WIDTHS * shape.width + KEPT_HIDDEN * shape.hidden
    one = KEPT_WIDTHS * shape.width + KEPT_HIDDEN * shape.hidden if cfg.recompute else 0.0
    kept = rows * (length + clean) * (shape.depth * layer + one)
    return Memory(12 * parameters, 8 * parameters - 4 * matrices, round(item * kept))
