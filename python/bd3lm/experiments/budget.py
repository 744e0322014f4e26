"""What a training step costs in floating-point operations: the common measure of the systems."""

from __future__ import annotations

from bd3lm.config import TrainConfig


def step_flops(cfg: TrainConfig, vocab_size: int) -> float:
    """Floating-point operations of one step, forward and backward, by counting products.

    A multiplication and an addition are two; the backward pass costs twice the forward one. What
    is counted is what has to be computed: of the attention's pairs only those that see each
    other, in the last layer and the output head only positions whose token is predicted (half of
    them under loglinear levels). Norms, rotations and adaLN are left out.

    Args:
        cfg: the run.
        vocab_size: V.
    """
    model, length, block = cfg.model, cfg.seq_len, cfg.block
    kv_width = model.num_kv_heads * model.head_width
    to_queries, to_keys = model.width**2, 2 * model.width * kv_width
    up = 2 if model.mlp == "swiglu" else 1
    after = model.width**2 + (up + 1) * model.width * model.hidden  # projection and MLP
    predicted = length if cfg.system == "ar" else length / 2
    two_streams = cfg.system == "bd3lm" and block < length
    positions = 2 * length if two_streams else length
    layer = positions * (to_queries + to_keys + after)
    last = length * to_queries + positions * to_keys + predicted * after
    products = (model.depth - 1) * layer + last + predicted * model.width * vocab_size
    # Clean blocks see themselves and what is before them; so do noised ones.
    pairs = length * (length + block) / 2 * (2 if two_streams else 1)
    attention = 2 * model.width * pairs * model.depth
    return 6.0 * cfg.batch_size * (products + attention)
