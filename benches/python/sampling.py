"""Sampling on the CPU: ours at one row and at sixteen, the original's at one, and the floor.

The shape is the paper's tiny DiT with random weights: width 256, depth 8, 8 heads, GPT-2's ids;
128 tokens in blocks of 4, first hitting, nucleus 0.9. Weights and speed have nothing to do with
each other, except that a nucleus of random weights holds most of the vocabulary.

The original is measured where ``BD3LM_PEER`` names a folder with it, by the interpreter that
``BD3LM_PEER_PYTHON`` names (this one by default); one of its rows is drawn between ours, and the
ratios are of neighbours. The floor is the time to read the weights of a forward once, at the
rate at which this machine sums a large array.

Run: python benches/python/sampling.py [--repeats N] [--precision fp32|bf16] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, write

from bd3lm.config import SampleConfig
from bd3lm.config.presets import tiny
from bd3lm.device import has_bf16
from bd3lm.model import Transformer, for_inference
from bd3lm.sample import Sample, Sampler
from bd3lm.systems import BlockDiffusion

LENGTH, BLOCK, IDS = 128, 4, 50_257
DRAWN = LENGTH - 1  # BOS is given


def our_sampler(dtype: torch.dtype) -> tuple[Sampler, int]:
    """Our model with random weights everywhere, and the bytes of matrices that a forward reads."""
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(tiny().model, dropout=0.0), IDS + 1)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.02)
    layers = (
        b.get_submodule(n) for b in model.blocks for n in ("qkv", "out", "mlp.up", "mlp.down")
    )
    values = sum(layer.weight.numel() for layer in (*layers, model.head))  # type: ignore[union-attr]
    system = BlockDiffusion(BLOCK, mask_id=IDS)
    ready = for_inference(model, dtype)
    sampler = Sampler(ready, system, window=LENGTH, bos_id=IDS - 1, eos_id=IDS + 1)
    return sampler, values * dtype.itemsize


def read_rate() -> float:
    """Bytes a second at which a sum reads 256 MB; the best of five."""
    values = torch.ones(1 << 26)
    return values.nbytes / min(timed(values.sum)[0] for _ in range(5))


def timed(step: Callable[[], object]) -> tuple[float, object]:
    """Wall time of one call, and its result."""
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


def start_peer() -> subprocess.Popen[str] | None:
    """The original, waiting for a line a row; None where it is not there."""
    if "BD3LM_PEER" not in os.environ:
        print("the original is skipped: BD3LM_PEER does not name a folder with it")
        return None
    python = os.environ.get("BD3LM_PEER_PYTHON", sys.executable)
    command = [python, str(Path(__file__).with_name("peer_sample.py"))]
    for name, value in (("length", LENGTH), ("block", BLOCK), ("vocab", IDS)):
        command += [f"--{name}", str(value)]
    command += ["--threads", str(torch.get_num_threads())]
    quiet = {**os.environ, "TQDM_DISABLE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=quiet)


def peer_row(child: subprocess.Popen[str]) -> tuple[float, int]:
    """Seconds and forwards of one row of the original."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    answer = json.loads(child.stdout.readline())
    return answer["seconds"], answer["forwards"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    best = "bf16" if has_bf16(torch.device("cpu")) else "fp32"
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=best)
    parser.add_argument("--out", type=Path, default=RESULTS / "sampling.json")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    sampler, weight_bytes = our_sampler(dtype)
    config = SampleConfig(length=LENGTH, top_p=0.9)
    child = start_peer()

    def ours(rows: int) -> tuple[float, int]:
        took, samples = timed(lambda: sampler.generate(config, [[]] * rows))
        first: Sample = samples[0]  # type: ignore[index]
        return rows * DRAWN / took, first.nfe

    ours(1), ours(16)
    if child is not None:
        peer_row(child)
    speeds: dict[str, list[float]] = {"1 row": [], "16 rows": [], "the original, 1 row": []}
    forwards: dict[str, int] = {}
    for _ in range(args.repeats):
        for name, rows in (("1 row", 1), ("16 rows", 16)):
            speed, forwards[name] = ours(rows)
            speeds[name].append(speed)
        if child is not None:
            took, forwards["the original, 1 row"] = peer_row(child)
            speeds["the original, 1 row"].append(DRAWN / took)
    if child is not None:
        child.terminate()
    rate = read_rate()
    floor = DRAWN / (forwards["1 row"] * weight_bytes / rate)
    peer = speeds.pop("the original, 1 row")
    results = {
        "floor": {
            "tokens_per_second": floor,
            "bytes": weight_bytes,
            "bytes_per_second": rate,
        }
    }
    for name, values in speeds.items():
        ratios = [a / b for a, b in zip(values, peer, strict=bool(peer))]
        results[name] = summary(values, ratios, forwards[name])
        print(f"ours, {args.precision}, {name}: {describe(results[name])}")
    if peer:
        results["peer"] = summary(peer, [], forwards["the original, 1 row"])
        print(f"the original, fp32, 1 row: {describe(results['peer'])}")
    print(
        f"floor, 1 row: {floor:.0f} tokens/s: {weight_bytes / 1e6:.1f} MB at {rate / 1e9:.1f} GB/s"
    )
    write(args.out, {"precision": args.precision, **results})


def summary(values: list[float], ratios: list[float], forwards: int) -> dict[str, float]:
    """Medians, and the range of the ratios."""
    found = {"tokens_per_second": statistics.median(values), "forwards": forwards}
    if ratios:
        found |= {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def describe(found: dict[str, float]) -> str:
    """One line of the above."""
    line = f"{found['tokens_per_second']:.1f} tokens/s, {found['forwards']} forwards"
    if "ratio" in found:
        line += f", {found['ratio']:.1f}x the original ({found['low']:.1f}-{found['high']:.1f})"
    return line


if __name__ == "__main__":
    main()
