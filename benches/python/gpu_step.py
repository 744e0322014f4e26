"""A training step on a GPU by each attention backend: tokens/s, TFLOP/s and MFU.

The whole step of :class:`bd3lm.training.Trainer` on random text: forward, backward, clipping,
optimizer and average, bf16 autocast, batches made ahead. Operations are those that the step has to
do (:func:`bd3lm_paper.budget.step_flops`), whatever a backend computes beside them; MFU is
their rate over the data sheet's dense bf16 peak. Tokens are those of x0. Never run so far
(docs/gpu.md).

Usage: ``python benches/python/gpu_step.py [PRESET] [--seq-len L] [--block-size S]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch

from bd3lm.config import preset
from bd3lm.data import load_tokenizer, prepare
from bd3lm.data.resolve import open_splits
from bd3lm.model.attention import BACKENDS
from bd3lm.model.flops import step_flops
from bd3lm.training import Trainer

PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "4090": 165e12, "L40S": 362e12}
"""Dense bf16 operations a second with float32 sums, of NVIDIA's data sheets, by a part of the
device's name."""
WARMUP, STEPS = 5, 20


class Quiet:
    """A reporter that says nothing."""

    def step(self, done: int, metrics: dict[str, float]) -> None: ...
    def validation(self, step: int, result: object) -> None: ...
    def scoring(self, done: int, total: int) -> None: ...
    def note(self, message: str) -> None: ...


def milliseconds(trainer: Trainer) -> float:
    """Mean time of a step by CUDA events, the host running ahead as it does in training."""
    for _ in range(WARMUP):
        trainer.step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(STEPS):
        trainer.step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / STEPS


def random_text(root: Path, tokens: int) -> Path:
    """Prepared splits of random words; what they say does not matter here."""
    tokenizer = load_tokenizer("default")
    ids = torch.randint(10, tokenizer.vocab_size - 10, (tokens,)).tolist()
    for split, part in (("train", ids), ("valid", ids[: tokens // 8])):
        text = root / f"{split}.txt"
        text.write_text(tokenizer.decode(part), encoding="utf-8")
        prepare([text], tokenizer, root / "data" / split)
    return root / "data"


def main() -> None:
    """Print one line a backend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset", nargs="?", default="small")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_step: skipped, for it needs an NVIDIA GPU and this machine has none.")
        return
    name = torch.cuda.get_device_name()
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    print(name, "torch", torch.__version__, args)
    print(f"{'backend':8} {'ms':>8} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>6}")
    with tempfile.TemporaryDirectory() as folder:
        data = random_text(Path(folder), 64 * args.seq_len)
        cfg = dataclasses.replace(
            preset(args.preset),
            data=str(data),
            seq_len=args.seq_len,
            block_size=args.block_size,
            batch_size=args.batch_size,
            micro_batch=None,
            steps=WARMUP + STEPS,
            device="cuda",
            precision="bf16",
        )
        splits = open_splits(cfg.data, None, "default", Path(folder) / "work", print)
        for backend in ("triton", "flex", "dense"):
            if not BACKENDS[backend].available():
                print(f"{backend:8} {BACKENDS[backend].needs}")
                continue
            run = dataclasses.replace(cfg, attention=backend)
            trainer = Trainer(run, splits.train, splits.valid, Path(folder), Quiet())
            spent = milliseconds(trainer)
            trainer.batches.close()
            rate = step_flops(run, splits.train.tokenizer.vocab_size) / spent * 1e3
            share = "-" if peak is None else f"{100 * rate / peak:.1f}%"
            tokens = run.batch_size * run.seq_len / spent * 1e3
            print(f"{backend:8} {spent:8.1f} {tokens:10.0f} {rate / 1e12:8.1f} {share:>6}")
            del trainer
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
