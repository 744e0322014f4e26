"""A training step against the original implementation's: time, peak memory, use of the processor.

Both take the shapes and the recipe of ``bd3lm-train tiny`` (width 256, depth 8, adaLN, dropout,
AdamW, weight average) and run in processes of their own, so that each has its own peak of resident
memory; their steps take turns, and a ratio is of neighbours. The original is run in fp32, as its
code does on a CPU (its autocasts are for CUDA), and under a bf16 autocast around it. It is imported
from the folder that ``BD3LM_PEER`` names, by the interpreter that ``BD3LM_PEER_PYTHON`` names (with
hydra-core, lightning, transformers, einops and timm); without them its columns are left out.

MFU is the share of the fastest large bf16 matrix product of the same run, counted by
:func:`bd3lm.model.flops.step_flops`.

Run: python benches/python/training_step.py [--rounds N] [--threads N] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from common import RESULTS, spread, write

from bd3lm.config import TrainConfig, preset
from bd3lm.data.store import TokenArrays
from bd3lm.model.flops import peak_flops, step_flops
from bd3lm.training.trainer import Trainer, frozen


class Case(NamedTuple):
    """One shape, and the least time of the original on this work."""

    name: str
    length: int
    block: int
    batch: int
    vocab: int


CASES = {
    "a": Case("L=128 S=4 B=32 V=30522", 128, 4, 32, 30522),
    "b": Case("L=1024 S=16 B=4 V=50257", 1024, 16, 4, 50257),
}
STEPS = 4
"""Runs of ours between two of the original."""


def config(case: Case) -> TrainConfig:
    """The paper's tiny model and recipe, at the case's shape."""
    base = preset("tiny")
    return dataclasses.replace(
        base, seq_len=case.length, block_size=case.block, batch_size=case.batch, steps=1 << 20
    )


class RandomText(TokenArrays):
    """Random ids where a data set would be read."""

    def __init__(self, case: Case) -> None:
        ids = torch.randint(200, case.vocab - 1, (64 * case.batch * case.length,)).tolist()
        super().__init__([ids], vocab_size=case.vocab, bos_id=101, eos_id=102, mask_id=103)
        self.tokenizer = SimpleNamespace(vocab_size=case.vocab, mask_id=103)


def serve(case: Case, threads: int) -> None:
    """Run our trainer, a step a line; the peak of the machine is measured before each."""
    torch.set_num_threads(threads)
    text, cfg = RandomText(case), config(case)
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(cfg, text, text, Path(out), None)  # type: ignore[arg-type]
        with closing(trainer.batches), frozen():  # as in a run
            for _ in sys.stdin:
                begun = time.perf_counter()
                for _ in range(STEPS):
                    loss, _ = trainer.step()
                loss = loss.item()
                took = (time.perf_counter() - begun) / STEPS
                line = {"seconds": took, "peak": peak_memory(), "loss": loss}
                print(json.dumps(line), flush=True)


def peak_memory() -> int:
    """Most bytes that were ever resident in this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


class Child:
    """A process that runs a step for each line of input."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended; run it alone to see why")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def peer_command(case: Case, threads: int, precision: str) -> list[str] | None:
    """Command that starts the original; None where it is not there."""
    folder = os.environ.get("BD3LM_PEER")
    if folder is None or not Path(folder, "diffusion.py").is_file():
        print("the original is skipped: BD3LM_PEER does not name a folder with diffusion.py")
        return None
    python = os.environ.get("BD3LM_PEER_PYTHON", sys.executable)
    shape = {k: v for k, v in case._asdict().items() if k != "name"} | {"threads": threads}
    script = str(Path(__file__).with_name("peer_step.py"))
    options = [f"--{k}={v}" for k, v in shape.items()]
    return [python, script, *options, f"--precision={precision}"]


def measure(key: str, threads: int, rounds: int, precision: str) -> dict[str, Any]:
    """Interleaved steps of both, after one unmeasured step of each."""
    case = CASES[key]
    mine = Child([sys.executable, __file__, "--serve", key, "--threads", str(threads)])
    command = peer_command(case, threads, precision)
    peer = None if command is None else Child(command)
    mine.step()
    if peer is not None:
        peer.step()
    ours, theirs, peaks = [], [], []
    for _ in range(rounds):
        peak_flops.cache_clear()
        peaks.append(peak_flops(torch.device("cpu"), torch.bfloat16, threads))
        ours.append(mine.step())
        if peer is not None:
            theirs.append(peer.step())
    mine.close()
    flops = step_flops(config(case), case.vocab)
    times = [step["seconds"] for step in ours]
    best = max(peaks)
    result: dict[str, Any] = {
        "case": case.name,
        "threads": threads,
        "seconds": spread(times),
        "tokens_per_second": case.batch * case.length / statistics.median(times),
        "memory": ours[-1]["peak"],
        "flops": flops,
        "peak_flops": best,
        "mfu": spread([flops / t / best for t in times]),
    }
    if peer is not None:
        peer.close()
        result |= {
            "peer_precision": precision,
            "peer_seconds": spread([step["seconds"] for step in theirs]),
            "peer_memory": theirs[-1]["peak"],
            "ratio": spread([t["seconds"] / o for t, o in zip(theirs, times, strict=True)]),
            "memory_ratio": theirs[-1]["peak"] / ours[-1]["peak"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    precisions = ("fp32", "bf16")
    parser.add_argument("--precision", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--serve", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "training_step.json")
    args = parser.parse_args()
    if args.serve:
        serve(CASES[args.serve], args.threads)
        return
    torch.set_num_threads(args.threads)
    results = []
    for key, precision in itertools.product(args.cases, args.precision):
        result = measure(key, args.threads, args.rounds, precision)
        results.append(result)
        line = f"{result['case']}: {result['seconds']['median']:.3f} s a step"
        line += f", {result['memory'] / 1e9:.2f} GB, MFU {result['mfu']['median']:.1%}"
        line += f" of {result['peak_flops'] / 1e9:.0f} GF/s"
        if "ratio" in result:
            line += f"; the original in {precision} {result['peer_seconds']['median']:.2f} s"
            line += f", {result['peer_memory'] / 1e9:.2f} GB: {result['ratio']['median']:.1f} times"
            line += f" as long, {result['memory_ratio']:.1f} times the memory"
        print(line, flush=True)
    write(args.out, results)


if __name__ == "__main__":
    main()
