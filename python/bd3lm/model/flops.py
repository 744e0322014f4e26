"""Model FLOPs utilization (MFU): operations of a training step, and peak speed of the machine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from bd3lm.config import TrainConfig
from bd3lm.model.adaptive import ranges


def step_flops(cfg: TrainConfig, vocab_size: int) -> float:
    """Count the floating-point operations of one step, forward and backward.

    A multiply-add counts as two; the backward pass costs twice the forward pass. Only necessary
    work counts: unmasked pairs of the attention; the clean stream without its last block, and of
    its last layer only keys and values; in the last layer and the output head only predicted
    positions (half of them under loglinear levels). With a next-token loss the clean stream is
    computed whole. All views of a row share it. Norms, rotations and adaLN are left out. Frozen
    matrices below adapters have no gradient of their own, and the adapters are left out.

    Args:
        cfg: the run.
        vocab_size: V.
    """
    sizes = cfg.objective.block_sizes or (cfg.block,)
    joint = sum(_of_block(cfg, vocab_size, size) for size in sizes) / len(sizes)
    if cfg.objective.ramp_steps:
        share = min(cfg.objective.ramp_steps / cfg.steps, 1.0)
        joint = share * joint + (1.0 - share) * _of_block(cfg, vocab_size, cfg.block)
    if not cfg.objective.ar_steps:
        return joint
    warm = min(cfg.objective.ar_steps / cfg.steps, 1.0)
    untold = dataclasses.replace(cfg.model, time_conditioning=False)
    alone = dataclasses.replace(cfg, model=untold).autoregressive()
    return warm * _of_block(alone, vocab_size, 1) + (1.0 - warm) * joint


def _of_block(cfg: TrainConfig, vocab_size: int, block: int) -> float:
    """:func:`step_flops` of a step with blocks of this size."""
    model, length = cfg.model, cfg.seq_len
    q_width, kv_width = (n * model.head_width for n in (model.heads, model.num_kv_heads))
    to_queries, to_keys = model.width * q_width, 2 * model.width * kv_width
    up = 2 if model.mlp == "swiglu" else 1
    after = model.width * q_width + (up + 1) * model.width * model.hidden  # projection and MLP
    noised = cfg.objective.views_at(block) * length
    predicted = length if cfg.system == "ar" else noised / 2
    clean, queries, clean_depth = 0, noised, model.depth - 1
    if cfg.objective.ar_weight > 0:
        clean, queries, clean_depth = length, noised + length, model.depth
        predicted += length if cfg.objective.ar_tokens == "all" else length / 2
    elif cfg.system == "bd3lm" and block < length:
        clean = length - block
    positions = noised + clean
    columns = head_columns(model.softmax_cutoffs, vocab_size)
    layer = positions * (to_queries + to_keys + after)
    last = queries * to_queries + positions * to_keys + predicted * after
    products = (model.depth - 1) * layer + last + predicted * model.width * columns
    # Blocks of either stream see their own and the clean ones before them.
    pairs = noised * (length + block) / 2
    clean_pairs = clean * (clean + (1 if model.causal_clean else block)) / 2
    attention = 2 * q_width * (pairs * model.depth + clean_pairs * clean_depth)
    of_products = 4.0 if cfg.lora.rank else 6.0
    return cfg.batch_size * (of_products * products + 6.0 * attention)


def head_columns(cutoffs: Sequence[int], vocab_size: int) -> float:
    """Logits that the head computes for a predicted position, on average.

    With an adaptive softmax those of the shortlist and, for a token of a cluster, those of the
    cluster. Tokens are taken to follow Zipf's law: the id n has a share of 1/n.
    """
    cutoffs = [c for c in cutoffs if c < vocab_size]
    if not cutoffs:
        return vocab_size
    columns = float(cutoffs[0] + len(cutoffs))
    for low, high in ranges(cutoffs, vocab_size):
        columns += (high - low) * (_harmonic(high) - _harmonic(low)) / _harmonic(vocab_size)
    return columns


def _harmonic(n: int) -> float:
    """Sum of 1/k for k = 1..n, to a hundredth of its last term."""
    return math.log(n) + EULER_GAMMA + 0.5 / n


EULER_GAMMA = 0.5772156649
CPU_PEAK_SIZE = 1024
"""Rows and columns of the square product whose speed is a CPU's peak."""
CUDA_PEAK_SIZE = 8192
"""The same on a GPU, where a product of 1024 takes less time than its launch."""
DATA_SHEET = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "4090": 165e12, "L40S": 362e12}
"""Dense bf16 operations a second with float32 sums, of NVIDIA's data sheets for the SXM (A100,
H100, H200) and PCIe cards, by a part of the device's name."""


@cache
def peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Peak speed of the device, in floating-point operations a second.

    For bf16 on a GPU of :data:`DATA_SHEET` it is the data sheet's figure, which the field divides
    by. Otherwise it is the best of a few large matrix products, measured once a process in a
    fraction of a second. On a busy machine that figure is too low.

    Args:
        device: the device.
        dtype: of the factors.
        threads: PyTorch's thread count; a new count is measured again.
    """
    assert device.type != "cpu" or threads == torch.get_num_threads()
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = data_sheet_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    size = CUDA_PEAK_SIZE if device.type == "cuda" else CPU_PEAK_SIZE
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    with torch.inference_mode():
        best = min(_product_seconds(a, b) for _ in range(10))
    return 2 * size**3 / best


def data_sheet_peak(name: str) -> float | None:
    """Peak of a device by its name, or None; PCIe variants of the SXM cards are not known."""
    if "PCIe" in name or "PCIE" in name:
        return None
    return next((peak for part, peak in DATA_SHEET.items() if part in name), None)


def _product_seconds(a: Tensor, b: Tensor) -> float:
    """Time of one product; on a GPU between events, so that neither launch nor copy counts."""
    if not a.is_cuda:
        begun = time.perf_counter()
        (a @ b)[0, 0].item()
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    a @ b
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
