"""``bd3lm-eval``: how likely a checkpoint finds a text."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from bd3lm.checkpoint import Checkpoint, load_checkpoint
from bd3lm.cli.common import run
from bd3lm.cli.summary import facts, likelihood_line
from bd3lm.config import (
    AttentionName,
    DetokenizerName,
    EstimatorName,
    LikelihoodName,
    ScheduleName,
)
from bd3lm.device import resolve_device
from bd3lm.evaluate.score import Scoring, open_text


@dataclass(frozen=True)
class EvalArgs:
    """Score text under a checkpoint: perplexity and bits per byte, with standard errors.

    By default the figures come from the NELBO, an upper bound on the negative log-likelihood in
    nats a token, computed exactly up to block size 4 and estimated above. --likelihood marginal is
    the exact likelihood of the sampler up to block size 8.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The checkpoint/ directory of a run, or a checkpoint of the original implementation: its
    directory or its name on the Hugging Face hub."""
    tokenizer: str | None = None
    """For a checkpoint that carries none: a file, a folder or a hub name. None: gpt2."""
    data: Path | None = None
    """A prepared directory, a text file or hub:NAME. None: the validation split of the
    checkpoint's run."""
    lines: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A text file holds a document a line."""
    detokenizer: DetokenizerName | None = None
    """Rules that put a tokenized benchmark text back as it was written."""
    eos: bool = True
    """End documents of a text file with EOS. --no-eos: the paper's zero-shot texts."""
    row_eos: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Close every row with an EOS that is scored, as the paper's code does. A run that was trained
    on such rows is always scored on them."""
    likelihood: LikelihoodName = "nelbo"
    """nelbo: an upper bound. marginal: exact for the first-hitting sampler, up to block size 8
    (2^S - 1 forwards a row). left-to-right, confidence: exact for a sampler that reveals in that
    order (S forwards). orders: an upper bound on the marginal from --repeats random orders."""
    estimator: Literal["auto"] | EstimatorName = "auto"
    """Of the NELBO. auto: exact up to block size 4, stratified above. bernoulli is the paper's."""
    block_size: int | None = None
    """Score with blocks of another size than the trained one."""
    repeats: int = 8
    """Forwards a row of the sampled estimators, or orders a row; the standard error falls with the
    root."""
    rows: int | None = None
    """Score so many rows, spread evenly over the text. None: all."""
    schedule: ScheduleName = "loglinear"
    """bernoulli: draw levels by this schedule, with the run's own parameters; the bound is the
    same under each of them, its error is not."""
    variance: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also the variance of the loss between blocks (Var. NELBO). With --estimator count or
    bernoulli: of that one, over all levels. Else of the training loss, under the run's own noise:
    its estimator, its clip, what it learned of either."""
    stride: int | None = None
    """Let rows overlap and score only their last STRIDE tokens, which gives each token more
    context. None: rows do not overlap."""
    batch_size: int = 64
    """Rows a forward."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Arithmetic of the forwards."""
    attention: AttentionName = "auto"
    """What computes attention."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``bd3lm-eval``."""
    run(lambda: evaluate(tyro.cli(EvalArgs, prog="bd3lm-eval", args=argv)))


def evaluate(args: EvalArgs) -> None:
    """Load, score, print."""
    console = Console(stderr=args.json)
    loaded = load_checkpoint(args.checkpoint, resolve_device(args.device), args.tokenizer)
    named = args.estimator if args.estimator in ("count", "bernoulli") else None
    with tempfile.TemporaryDirectory() as work:
        data = open_text(
            loaded,
            args.data,
            Path(work),
            console.print,
            lines=args.lines,
            detokenizer=args.detokenizer,
            eos=args.eos,
        )
        scoring = Scoring.prepare(
            loaded,
            data,
            estimator=args.estimator,
            repeats=args.repeats,
            block_size=args.block_size,
            stride=args.stride,
            row_eos=args.row_eos,
            schedule=args.schedule,
            precision=args.precision,
            attention=args.attention,
        )
        noise = scoring.variance_noise(named) if args.variance else None
        with Progress(console=console) as progress:
            task = progress.add_task("scoring", total=len(scoring.rows))
            result = scoring.likelihood(
                args.likelihood,
                batch_size=args.batch_size,
                max_rows=args.rows,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        record = {
            "checkpoint": str(args.checkpoint),
            "system": loaded.config.system,
            "block_size": scoring.config.block,
            "step": loaded.step,
            **result.to_dict(),
        }
        if noise is not None:
            record["variance"] = scoring.variance(noise, args.batch_size)
    if args.json:
        sys.stdout.write(json.dumps(record) + "\n")
    else:
        _report(record, named or loaded.config.noise.estimator, loaded, console)


def _report(record: dict[str, Any], estimator: str, loaded: Checkpoint, console: Console) -> None:
    """Two columns; ``estimator`` is that of the variance."""
    summary = {f"val_{k}": v for k, v in record.items()} | {"estimator": record["estimator"]}
    rows = {
        "model": f"{loaded.config.system}, S={record['block_size']}, step {loaded.step}",
        "likelihood": likelihood_line(summary),
        "forwards": f"{record['forwards']} a row",
    }
    if "variance" in record:
        rows["variance"] = f"{record['variance']:.4f} (Var. NELBO, {estimator})"
    facts(console, f"Scored {record['checkpoint']}", rows)
