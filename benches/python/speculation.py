"""Self-speculation against drawing token by token and first hitting: forwards and seconds.

One checkpoint with a causal clean stream draws the same number of tokens in three ways: as an
autoregressive model, by first hitting, and by self-speculation at each block size it was trained
on. Tokens a forward counts every forward; its ceiling is what the measured overlap of the two
distributions allows (docs/math.md §8). The ways take turns.

Run: python benches/python/speculation.py CHECKPOINT [--length N] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write

from bd3lm.checkpoint import load_checkpoint
from bd3lm.config import SampleConfig
from bd3lm.device import has_bf16
from bd3lm.sample import Sampler

TEMPERATURES = (0.0, 0.7, 1.0)
ROWS = (1, 16)
SIZES = {4, 8}
UNREACHED = -1
"""No token has this id, so that every row has the same length."""


def draw(sampler: Sampler, rows: int, cfg: SampleConfig) -> tuple[float, float]:
    """Tokens a second and tokens a forward of one batch."""
    begun = time.perf_counter()
    samples = sampler.generate(cfg, [[]] * rows)
    seconds = time.perf_counter() - begun
    tokens = sum(len(s.ids) for s in samples)
    return tokens / seconds, tokens / sum(s.nfe for s in samples)


def main() -> None:
    """Interleave the draws, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "speculation.json")
    args = parser.parse_args()
    loaded = load_checkpoint(args.checkpoint)
    dtype = torch.bfloat16 if has_bf16(torch.device("cpu")) else torch.float32
    trained = {loaded.config.block, *loaded.config.objective.block_sizes}
    sizes = sorted(trained & SIZES)
    ways: dict[str, tuple[Sampler, bool]] = {
        "ar": (Sampler.from_checkpoint(loaded.as_autoregressive(), dtype=dtype), False),
        "first hitting": (Sampler.from_checkpoint(loaded, dtype=dtype), False),
    }
    for size in sizes:
        ways[f"speculation S={size}"] = (Sampler.from_checkpoint(loaded, size, dtype), True)
    found: list[dict[str, Any]] = []
    for temperature in TEMPERATURES:
        for rows in ROWS:
            runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for repeat in range(args.repeats):
                for way, (sampler, speculate) in ways.items():
                    sampler.eos_id = UNREACHED
                    cfg = SampleConfig(
                        length=args.length,
                        temperature=temperature,
                        top_p=1.0,
                        speculate=speculate,
                        seed=repeat,
                    )
                    runs[way].append(draw(sampler, rows, cfg))
            for way, (sampler, speculate) in ways.items():
                seconds, forwards = zip(*runs[way], strict=True)
                line = {
                    "way": way,
                    "rows": rows,
                    "temperature": temperature,
                    "tokens_per_second": statistics.median(seconds),
                    "tokens_per_forward": statistics.fmean(forwards),
                }
                acceptance = sampler.acceptance
                if speculate and acceptance is not None:
                    tried = acceptance.tried
                    line["ceiling"] = acceptance.ceiling
                    line["tried"] = tried.tolist()
                    line["accepted"] = (acceptance.accepted / tried.clip(min=1)).tolist()
                    line["overlap"] = (acceptance.overlap / tried.clip(min=1)).tolist()
                found.append(line)
                print(line)
    write(args.out, {"length": args.length, "sizes": sizes, "found": found})


if __name__ == "__main__":
    main()
