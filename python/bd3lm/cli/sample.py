"""``bd3lm-sample``: text from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from bd3lm.checkpoint import load_checkpoint
from bd3lm.cli.common import run
from bd3lm.cli.live import show
from bd3lm.config import AttentionName, SampleConfig, check
from bd3lm.device import check_attention, inference, resolve_device
from bd3lm.sample import Sampler


@dataclass(frozen=True)
class SampleArgs:
    """Draw text, block by block, one forward of the model a token."""

    checkpoint: tyro.conf.Positional[Path]
    """The checkpoint/ directory of a run, or a checkpoint of the original implementation: its
    directory or its name on the Hugging Face hub."""
    tokenizer: str | None = None
    """For a checkpoint that carries none: a file, a folder or a hub name. None: gpt2."""
    prompt: str = ""
    """Text that every sample begins with."""
    draw: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    block_size: int | None = None
    """Sample with blocks of another size than the trained one."""
    batch_size: int = 16
    """Rows drawn at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Matrices of the forwards. auto: bf16 where the device multiplies it faster; logits and
    probabilities are summed in wider types."""
    attention: AttentionName = "auto"
    """What computes attention."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object a sample and nothing else."""
    live: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show samples while they are drawn, one after the other: in a terminal how each block
    denoises, elsewhere its text when it is finished."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``bd3lm-sample``."""
    run(lambda: sample(tyro.cli(SampleArgs, prog="bd3lm-sample", args=argv)))


def sample(args: SampleArgs) -> None:
    """Load, draw, print."""
    console = Console(stderr=args.json)
    device = resolve_device(args.device)
    loaded = load_checkpoint(args.checkpoint, device, args.tokenizer)
    tokenizer = loaded.tokenizer
    cfg = args.draw
    check(args.batch_size >= 1, "batch-size", args.batch_size, "at least 1")
    check(not (args.json and args.live), "live", True, "off where --json is on")
    how = dataclasses.replace(loaded.config, precision=args.precision, attention=args.attention)
    check_attention(how, device)
    loaded.model.use_attention(args.attention)
    matrices, arithmetic = inference(how, device)
    sampler = Sampler.from_checkpoint(loaded, args.block_size, matrices)
    length = sampler.length(cfg)
    prompt = tokenizer.encode(args.prompt)
    if args.live:
        with arithmetic:
            show(sampler, cfg, prompt, tokenizer, console)
        return
    with arithmetic, Progress(console=console, transient=True) as progress:
        task = progress.add_task("sampling", total=cfg.num * length)
        for first in range(0, cfg.num, args.batch_size):
            rows = min(args.batch_size, cfg.num - first)
            samples = sampler.generate(
                dataclasses.replace(cfg, num=rows),
                [prompt],
                first=first,
                progress=lambda done, f=first, n=rows: progress.update(
                    task, completed=f * length + done * n
                ),
            )
            for index, drawn in enumerate(samples, first):
                text = tokenizer.decode(drawn.ids)
                if args.json:
                    record = {"index": index, "text": text, **dataclasses.asdict(drawn)}
                    sys.stdout.write(json.dumps(record) + "\n")
                    continue
                console.rule(
                    f"sample {index + 1}: {len(drawn.ids)} tokens, {drawn.nfe} forwards, "
                    f"ended by {drawn.stop}"
                )
                console.print(text, markup=False, highlight=False)
