"""Growth of attention: time a token over L and over S, memory over L, forward and backward.

bf16 and float32, H = 8, D = 32, on one thread and on two; times are medians, from L = 4096 on
single runs. Memory counts
allocations between inputs and gradients, in its own process for each L. pictures.py draws the
figures.

Run: python benches/python/growth.py [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from common import RESULTS, seconds, write

from bd3lm.model.attention import BlockMask, rust

LENGTHS = [128 << i for i in range(8)]
BLOCKS = [1 << i for i in range(11)]
HEADS, WIDTH = 8, 32


def leaves(rows: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of the output, [B, H, 2L, D]."""
    shape = (rows, 2 * length, HEADS, WIDTH)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(4)]


def microseconds(length: int, block: int, dtype: torch.dtype, rounds: int) -> float:
    """Time of one token of x0, forward and backward."""
    rows = max(1, 4096 // length)
    q, k, v, d_out = leaves(rows, length, dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = BlockMask.training(length, block)

    def step() -> None:
        torch.autograd.grad(rust.rust_attention(*inputs, mask), inputs, d_out)

    if rows == 1:
        return 1e6 * seconds(step) / length
    step()
    return 1e6 * statistics.median(seconds(step) for _ in range(rounds)) / (rows * length)


SMALLEST = 16
"""A length that brings the library's code into memory, and needs next to none itself."""


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def extra_memory(length: int) -> int:
    """Bytes that a forward and backward pass adds to the inputs, once the library is loaded."""
    if length > SMALLEST:
        extra_memory(SMALLEST)
    q, k, v, d_out = leaves(1, length, torch.bfloat16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    before = resident("VmRSS")
    out = rust.rust_attention(*inputs, BlockMask.training(length, 16))
    torch.autograd.grad(out, inputs, d_out)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json")
    args = parser.parse_args()
    if args.memory:
        print(extra_memory(args.memory))
        return
    results = []
    shapes = [("length", n, 16) for n in LENGTHS] + [("block", 1024, s) for s in BLOCKS]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype in (torch.bfloat16, torch.float32):
            for over, length, block in shapes:
                value = microseconds(length, block, dtype, args.rounds)
                name = str(dtype).removeprefix("torch.")
                result = {"over": over, "length": length, "block": block, "dtype": name}
                results.append(result | {"threads": threads, "microseconds": value})
                print(f"L={length} S={block} {name} {threads} threads: {value:.2f} µs a token")
    memory = {}
    for length in LENGTHS:
        command = [sys.executable, __file__, "--memory", str(length)]
        memory[length] = int(subprocess.run(command, capture_output=True, check=True).stdout)
        print(f"L={length}: {memory[length] / 1e6:.1f} MB beyond the inputs")
    write(args.out, {"times": results, "memory": memory})


if __name__ == "__main__":
    main()
