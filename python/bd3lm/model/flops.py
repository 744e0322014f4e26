"""Model FLOPs utilization (MFU): operations of a training step, and peak speed of the machine."""

from __future__ import annotations

import time
from functools import cache

import torch

from bd3lm.config import TrainConfig


def step_flops(cfg: TrainConfig, vocab_size: int) -> float:
    """Count the floating-point operations of one step, forward and backward.

    A multiply-add counts as two; the backward pass costs twice the forward pass. Only necessary
    work counts: unmasked pairs of the attention; the clean stream without its last block, and of
    its last layer only keys and values; in the last layer and the output head only predicted
    positions (half of them under loglinear levels). Norms, rotations and adaLN are left out.

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
    clean = length - block if two_streams else 0
    positions = length + clean
    layer = positions * (to_queries + to_keys + after)
    last = length * to_queries + positions * to_keys + predicted * after
    products = (model.depth - 1) * layer + last + predicted * model.width * vocab_size
    # Blocks of either stream see their own and the clean ones before them.
    pairs = length * (length + block) / 2
    clean_pairs = clean * (clean + block) / 2
    attention = 2 * model.width * (pairs * model.depth + clean_pairs * (model.depth - 1))
    return 6.0 * cfg.batch_size * (products + attention)


PEAK_SIZE = 1024
"""Rows and columns of the square product whose speed is the peak."""


@cache
def peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Measure the peak speed of large matrix products, in floating-point operations a second.

    Measured once a process, in a fraction of a second. On a busy machine the figure is too low.

    Args:
        device: the device.
        dtype: of the factors.
        threads: PyTorch's thread count; a new count is measured again.
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
