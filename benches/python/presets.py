"""Cost of each preset: parameters, memory, operations and time of a step, time of the whole run.

The time of a step of the large presets is that of a few rows, multiplied: their runs would take
days here. The rows are those of the shipped text.
The table of docs/performance.md adds estimates for GPUs from the counted operations.

Run: python benches/python/presets.py [--rounds N] [--threads N] [--presets NAME …] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, spread, write
from training_step import peak_memory

from bd3lm.config import PRESETS, preset
from bd3lm.data.resolve import open_splits
from bd3lm.model import Transformer
from bd3lm.model.flops import step_flops
from bd3lm.model.memory import training_memory
from bd3lm.training.trainer import Trainer, frozen

VOCAB = 16_384
"""Ids of the default tokenizer."""
WHOLE, ROWS = 32, 8
"""Steps of at most so many rows are measured as they are, and this many rows of others."""


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One preset in this process."""
    whole = preset(name)
    rows = whole.batch_size if whole.batch_size <= WHOLE else ROWS
    few = dataclasses.replace(whole, batch_size=rows, steps=1 << 20)
    with tempfile.TemporaryDirectory() as out:
        text = open_splits(None, None, "default", Path(out) / "data", lambda _: None)
        trainer = Trainer(few, text.train, text.valid, Path(out), None)  # type: ignore[arg-type]
        times = []
        with closing(trainer.batches), frozen():
            for _ in range(rounds + 1):
                begun = time.perf_counter()
                loss, _ = trainer.step()
                loss.item()
                times.append(time.perf_counter() - begun)
    with torch.device("meta"):
        model = Transformer(whole.model, VOCAB)
    parts = whole.batch_size // few.batch_size
    return {
        "preset": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": whole.batch_size,
        "length": whole.seq_len,
        "steps": whole.steps,
        "flops": step_flops(whole, VOCAB),
        "memory": training_memory(whole, model, item=2).total,
        "micro_batch_memory": training_memory(few, model, item=2).total,
        "measured_rows": few.batch_size,
        "measured_peak": peak_memory(),
        "seconds": spread([parts * t for t in times[1:]]),
    }


def main() -> None:
    """Measure every preset in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--one", choices=PRESETS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "presets.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(args.one, args.rounds)))
        return
    found = []
    for name in args.presets:
        words = ["--one", name, "--rounds", str(args.rounds), "--threads", str(args.threads)]
        done = subprocess.run(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
        )
        found.append(json.loads(done.stdout))
        print(f"{name}: {found[-1]['seconds']['median']:.2f} s a step")
    write(args.out, {"vocab": VOCAB, "threads": args.threads, "presets": found})


if __name__ == "__main__":
    main()
