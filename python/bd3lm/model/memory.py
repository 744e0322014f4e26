"""Memory of training, before the first step."""

from __future__ import annotations

from typing import NamedTuple

from bd3lm.config import TrainConfig
from bd3lm.model.transformer import Transformer

LAYER_WIDTHS, LAYER_HIDDEN, FIXED_WIDTHS = 7.6, 1.5, 20.0
"""Numbers of each position that a layer keeps for its backward pass, as multiples of the width and
of the MLP's hidden width; and those that are there once, for the layer at work, the embedding and
the head. Fitted to the peak of resident memory on a CPU (3 and 8 layers, float32)."""


class Memory(NamedTuple):
    """Estimated bytes of a training run, by content.

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
    """Estimate the memory of a training step, to within a factor of 2.

    The interpreter and its libraries (0.3 to 0.7 GB) and the data, which is mapped, are left out,
    and so are the logits, which never exist for all positions at once.

    Args:
        cfg: the run.
        model: its model, in float32.
        item: bytes of an activation.
    """
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    sizes = [(n, p.numel(), p.ndim) for n, p in model.named_parameters() if p.requires_grad]
    parameters = sum(size for _, size, _ in sizes)
    muon = cfg.optim.optimizer == "muon"
    matrices = sum(n for name, n, ndim in sizes if muon and ndim == 2 and name.startswith("blocks"))
    shape, length, block = cfg.model, cfg.seq_len, cfg.block
    clean = length - block if cfg.system == "bd3lm" and block < length else 0
    clean = length if cfg.objective.ar_weight > 0 else clean
    noised = cfg.objective.views * length
    rows = cfg.micro_batch or cfg.batch_size
    full = LAYER_WIDTHS * shape.width + LAYER_HIDDEN * shape.hidden
    layers = full + shape.depth * shape.width if cfg.recompute else shape.depth * full
    kept = rows * (noised + clean) * (layers + FIXED_WIDTHS * shape.width)
    return Memory(12 * parameters + 4 * frozen, 8 * parameters - 4 * matrices, round(item * kept))
