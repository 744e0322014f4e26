"""What a training step costs in floating-point operations, and what the machine could do.

Their quotient over the time is the model FLOPs utilization (MFU).
"""

from __future__ import annotations

import time
from functools import cache

import torch

from bd3lm.config import TrainConfig


def step_flops(cfg: TrainConfig, vocab_size: int) -> float:
    """Floating-point operations of one step, forward and backward, by counting products.

    A multiplication and an addition are two; the backward pass costs twice the forward one. What
    is counted is what has to be computed: of the attention's pairs only those that see each
    other, of the clean stream all but its last block, in the last layer only its keys and values,
    and there and in the output head only positions whose token is predicted (half of them under
    loglinear levels). Norms, rotations and adaLN are left out.

    Args:
        cfg: the run.
        vocab_size: V.
    """
    model, length, block = cfg.model, cfg.seq_len, cfg.block
    q_width, kv_width = (n * model.head_width for n in (model.heads, model.num_kv_heads))
    to_queries, to_keys = model.width * q_width, 2 * model.width * kv_width
    up = 2 if model.mlp == "swiglu" else 1
    after = model.width * q_width + (up + 1) * model.width * model.hidden  # projection and MLP
    predicted = length if cfg.system == "ar" else length / 2
    two_streams = cfg.system == "bd3lm" and block < length
    clean = length - block if two_streams else 0
    positions = length + clean
    layer = positions * (to_queries + to_keys + after)
    last = length * to_queries + positions * to_keys + predicted * after
    products = (model.depth - 1) * layer + last + predicted * model.width * vocab_size
    # Blocks of either stream see their own and the clean ones before them.
    pairs = length * (length + block) / 2
    clean_pairs = clean * (clean + block) / 2
    attention = 2 * q_width * (pairs * model.depth + clean_pairs * (model.depth - 1))
    return 6.0 * cfg.batch_size * (products + attention)


PEAK_SIZE = 1024
"""Rows and columns of the square product whose speed is the peak."""


@cache
def peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Floating-point operations a second of the best of a few large matrix products there.

    Measured once a process, in a fraction of a second; a machine that is busy meanwhile looks
    slower than it is.

    Args:
        device: where.
        dtype: of the factors.
        threads: PyTorch's, to measure again after a change.
    """
    assert device.type != "cpu" or threads == torch.get_num_threads()
    a, b = (torch.ones(PEAK_SIZE, PEAK_SIZE, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    with torch.inference_mode():
        for _ in range(10):
            begun = time.perf_counter()
            (a @ b)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - begun)
    return 2 * PEAK_SIZE**3 / best
