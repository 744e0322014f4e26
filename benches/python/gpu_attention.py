"""Attention of a training step on a GPU: time and TFLOP/s of every backend.

Operations are those of the pairs that attend, 4·D forward and 14·D with the backward's two passes
counted as 10·D, the convention of the field; so a backend that computes what the mask hides looks
as slow as it is. ``flash-attn`` does not know the mask: its column is causal attention over the 2L
rows, about twice the pairs. Never run so far (docs/gpu.md).

Usage: ``python benches/python/gpu_attention.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from bd3lm.model.attention import BACKENDS, BlockMask, attend

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
BLOCKS = (4, 16, 64)
HEADS, WIDTH = 12, 64
TOKENS = 32768
"""L times the rows of a batch, so that every length does the same work beside attention."""
DENSE_UP_TO = 4096
"""The dense mask of L = 8192 alone is 256 MiB, its scores some GiB a head."""


def live_pairs(mask: BlockMask) -> int:
    """Query-key pairs that attend, of one head of one row."""
    clean_lo, clean_hi, noised_lo, noised_hi = (bound.long() for bound in mask.intervals())
    return int((clean_hi - clean_lo + noised_hi - noised_lo).sum())


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time by CUDA events, the L2 cache cleared before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def measure(backend: str, mask: BlockMask, qkv: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of a forward, and of a forward with its backward."""
    dout = torch.randn_like(qkv[0])

    def forward() -> Tensor:
        return attend(*qkv, mask, backend=backend)

    def both() -> None:
        torch.autograd.grad(forward(), qkv, dout)

    return milliseconds(forward), milliseconds(both)


def main() -> None:
    """Print one line a shape and backend."""
    if not torch.cuda.is_available():
        print("gpu_attention: skipped, for it needs an NVIDIA GPU and this machine has none.")
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(
        f"{'L':>6} {'S':>3} {'backend':8} {'fwd ms':>8} {'TFLOP/s':>8} {'f+b ms':>8} {'TFLOP/s':>8}"
    )
    for length, block in itertools.product(LENGTHS, BLOCKS):
        batch = TOKENS // length
        training = BlockMask.training(length, block)
        for backend in ("triton", "flex", "dense", "flash"):
            if backend == "dense" and length > DENSE_UP_TO:
                continue
            if not BACKENDS[backend].available():
                continue
            mask = BlockMask.clean(2 * length, 1) if backend == "flash" else training
            qkv = [
                torch.randn(batch, HEADS, 2 * length, WIDTH, device="cuda")
                .bfloat16()
                .requires_grad_()
                for _ in range(3)
            ]
            once, both = measure(backend, mask, qkv)
            unit = live_pairs(mask) * batch * HEADS * WIDTH / 1e9
            print(
                f"{length:6} {block:3} {backend:8} {once:8.3f} {4 * unit / once:8.1f} "
                f"{both:8.3f} {14 * unit / both:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
