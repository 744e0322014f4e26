"""A training step of the original implementation on the CPU: a child of training_step.py.

It runs a step for each line of input.

Its own code and settings are imported from the folder that ``BD3LM_PEER`` names and run by the
interpreter that ``BD3LM_PEER_PYTHON`` names. A step does the same as its trainer, in the
same order: loss, metric, backward pass, clipping, AdamW, weight average.

Reads a line for each step to run; prints seconds and peak memory as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, os.environ["BD3LM_PEER"])


def peer(args: argparse.Namespace):
    """The original's model with its own optimizer and average."""
    import hydra
    import main  # noqa: F401 registers the resolvers of its settings
    import transformers
    from diffusion import Diffusion

    tokenizer = SimpleNamespace(vocab_size=args.vocab, pad_token="[PAD]", pad_token_id=0)
    if args.vocab == 30522:  # BERT has a mask token, GPT-2 gets one
        tokenizer.mask_token, tokenizer.mask_token_id = "[MASK]", 103
    # Its metrics would download the tokenizer of a judge of samples, which training never uses.
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: tokenizer
    with hydra.initialize_config_dir(os.path.join(os.environ["BD3LM_PEER"], "configs"), "1.3"):
        config = hydra.compose(
            "config",
            [
                "model=tiny",
                "model.attn_backend=sdpa",
                f"model.length={args.length}",
                f"block_size={args.block}",
                f"loader.batch_size={args.batch}",
                f"loader.eval_batch_size={args.batch}",
            ],
        )
    model = Diffusion(config, tokenizer=tokenizer)
    optimizers, _ = model.configure_optimizers()
    return model.train(), optimizers[0], config.trainer.gradient_clip_val


def serve() -> None:
    """Build, then a step a line."""
    parser = argparse.ArgumentParser()
    for name in ("length", "block", "batch", "vocab", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    answer, sys.stdout = sys.stdout, sys.stderr  # its own prints go elsewhere
    model, optimizer, clip = peer(args)
    ids = torch.randint(200, args.vocab - 1, (args.batch, args.length))
    seen = torch.ones_like(ids, dtype=torch.float)
    parameters = list(model.parameters())

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            losses = model._loss(ids, seen)
        model.metrics.train_nlls.update(losses.nlls, losses.token_mask)
        losses.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        model.ema.update(model._get_parameters())
        return losses.loss.item()

    for _ in sys.stdin:
        begun = time.perf_counter()
        loss = step()
        took = time.perf_counter() - begun
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        print(json.dumps({"seconds": took, "peak": peak, "loss": loss}), file=answer, flush=True)


if __name__ == "__main__":
    serve()
