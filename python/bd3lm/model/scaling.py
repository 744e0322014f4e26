"""Memory and traffic of a rank, computed from the shape of a model before a job is started."""

from __future__ import annotations

from typing import NamedTuple

from bd3lm.config import TrainConfig
from bd3lm.model.flops import step_flops
from bd3lm.model.memory import training_memory
from bd3lm.model.transformer import Transformer


class RankCost(NamedTuple):
    """One rank of a job, in bytes.

    Attributes:
        state: weights, gradients, moments and average that live as long as the run.
        working: whole weights and gradients in use at one moment, of which FSDP keeps shards.
        activations: kept for the backward pass of one forward (a factor of 2 is possible).
        sent: bytes that a rank sends in a step among the ranks of one copy of the model; it
            receives as many.
        sent_far: the same between copies.
        flops: operations of a rank in a step.
    """

    state: int
    working: int
    activations: int
    sent: int
    sent_far: int
    flops: float

    @property
    def memory(self) -> int:
        """All that a rank holds at once."""
        return self.state + self.working + self.activations


def rank_cost(cfg: TrainConfig, model: Transformer, ranks: int, item: int = 2) -> RankCost:
    """Compute memory and traffic of a rank.

    Gradients are added in float32, rings send each byte ``(R-1)/R`` times, and gathered blocks
    have the dtype of the matrix products.

    Args:
        cfg: the run; its batch is divided over the ranks, in micro-batches.
        model: its model; a meta device will do.
        ranks: R.
        item: bytes of a number in matrix products and activations.
    """
    numel = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(numel.values())
    in_blocks = sum(n for name, n in numel.items() if name.startswith("blocks."))
    one_block = in_blocks // max(cfg.model.depth, 1)
    rest = total - in_blocks
    held = training_memory(cfg, model, item)
    rows = -(-cfg.batch_size // ranks)
    micro = min(cfg.micro_batch or rows, rows)
    forwards = -(-rows // micro)
    per_row = held.activations / (cfg.micro_batch or cfg.batch_size)
    state = held.weights + held.optimizer
    muon = _matrices(model) if cfg.optim.optimizer == "muon" else 0
    if cfg.parallel.strategy == "ddp":
        working = item * total  # autocast keeps the matrices in the dtype of the products
        sent, far = 0, _ring(2 * 4 * total, ranks)
    else:
        shards = ranks // cfg.parallel.replicas
        state //= shards
        # Two blocks are whole at once, and with gradients; embedding, head and norms all the time.
        working = 2 * one_block * (item + 4) + rest * (4 + 4)
        # A block runs on the clean stream and then on the views, and is gathered for each.
        calls = 2 if cfg.objective.views_at(cfg.block) > 1 and cfg.block < cfg.seq_len else 1
        gathered = calls * item * (2 * in_blocks - one_block) + 4 * rest
        sent = forwards * (_ring(gathered, shards) + _ring(4 * total, shards))
        far = _ring(2 * 4 * total // shards, cfg.parallel.replicas)
        sent += _ring(2 * item * muon // shards, shards)
    return RankCost(
        state=state,
        working=working,
        activations=round(per_row * micro),
        sent=sent,
        sent_far=far,
        flops=step_flops(cfg, model.vocab_size) / ranks,
    )


def _ring(size: int, ranks: int) -> int:
    """Bytes that a rank of a ring sends for ``size`` bytes of collectives."""
    return size * (ranks - 1) // ranks


def _matrices(model: Transformer) -> int:
    """Numbers that Muon updates."""
    sizes = [(name, p.numel(), p.ndim) for name, p in model.named_parameters()]
    return sum(n for name, n, ndim in sizes if ndim == 2 and name.startswith("blocks."))
