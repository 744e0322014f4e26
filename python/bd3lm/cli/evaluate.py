"""``bd3lm-eval``: how likely a checkpoint finds a text."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

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
    EvalConfig,
    ScheduleName,
    check,
)
from bd3lm.data import Dataset, NoiseSpec
from bd3lm.data.hub import PREFIX
from bd3lm.data.resolve import open_data
from bd3lm.device import autocast, check_attention, resolve_device
from bd3lm.errors import ConfigError, MissingFileError
from bd3lm.evaluate import Likelihood, evaluate_likelihood, nelbo_variance, scoring_rows
from bd3lm.systems.block_diffusion import schedule_of


@dataclass(frozen=True)
class EvalArgs:
    """Score text under a checkpoint: perplexity and bits per byte, with standard errors.

    The figures come from the NELBO, an upper bound on the negative log-likelihood in nats a
    token. By default it is computed exactly up to block size 4 and estimated above.
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
    estimator: Literal["auto"] | EstimatorName = "auto"
    """auto: exact up to block size 4, stratified above. bernoulli is the paper's."""
    block_size: int | None = None
    """Score with blocks of another size than the trained one."""
    repeats: int = 8
    """Forwards a row of the sampled estimators; their standard error falls with the root."""
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
    device = resolve_device(args.device)
    loaded = load_checkpoint(args.checkpoint, device, args.tokenizer)
    named = args.estimator in ("count", "bernoulli")
    check(
        not args.variance or named or loaded.config.noise.frequency_gap == 0,
        "variance",
        args.variance,
        "off, or go with --estimator count or bernoulli: a run that masks by frequency has a "
        "Var. NELBO on its training data only",
    )
    try:  # the run's own checks decide whether this combination is allowed
        cfg = dataclasses.replace(
            loaded.config,
            block_size=loaded.config.block_size if args.block_size is None else args.block_size,
            precision=args.precision,
            attention=args.attention,
            row_eos=loaded.config.row_eos or args.row_eos,
            eval=EvalConfig(estimator=args.estimator, repeats=args.repeats, stride=args.stride),
        )
    except ConfigError as error:  # what a run calls eval.repeats is --repeats here
        raise error.renamed(error.field.removeprefix("eval.")) from None
    check_attention(cfg, device)
    loaded.model.use_attention(args.attention)
    with tempfile.TemporaryDirectory() as work:
        data = _open(args, loaded, Path(work), console)
        rows = scoring_rows(cfg, data)
        schedule = schedule_of(
            dataclasses.replace(cfg.noise, schedule=args.schedule, paper_weights=False)
        )
        with autocast(cfg, device), Progress(console=console) as progress:
            task = progress.add_task("scoring", total=len(rows))
            result = evaluate_likelihood(
                loaded.system(args.block_size),
                loaded.model,
                rows,
                estimator=cfg.estimator,
                repeats=args.repeats,
                batch_size=args.batch_size,
                num_bytes=data.manifest.num_bytes,
                schedule=schedule,
                progress=lambda done, _: progress.update(task, completed=done),
            )
            variance = None
            if args.variance:
                system = loaded.system(args.block_size)
                spec = system.noise(0)
                if named:
                    spec = NoiseSpec(schedule, estimator=args.estimator)
                variance = nelbo_variance(
                    system, loaded.model, rows, spec, batch_size=args.batch_size
                )
    _report(args, loaded, result, variance, cfg.block, console)


def _open(args: EvalArgs, loaded: Checkpoint, work: Path, console: Console) -> Dataset:
    path = args.data
    if path is None:
        path = args.checkpoint.parent / "data" / "valid"
        if not path.is_dir():
            raise MissingFileError(
                f"{args.checkpoint} has no run with validation data beside it; name --data"
            )
    check(
        not path.is_dir() or (args.detokenizer is None and args.eos and not args.lines),
        "data",
        path,
        "a text file where lines, detokenizer or no-eos is given: a prepared data set has its own",
    )
    check(
        not args.lines or not str(path).startswith(PREFIX),
        "lines",
        args.lines,
        "off for a data set of the hub, which has records",
    )
    data = open_data(
        path,
        loaded.tokenizer,
        work / "data",
        console.print,
        lines=args.lines,
        detokenizer=args.detokenizer,
        eos=args.eos,
    )
    check(
        data.manifest.tokenizer_sha256 == loaded.tokenizer.sha256,
        "data",
        path,
        f"prepared with the checkpoint's own tokenizer ({loaded.tokenizer.name})",
    )
    return data


def _report(
    args: EvalArgs,
    loaded: Checkpoint,
    result: Likelihood,
    variance: float | None,
    block_size: int,
    console: Console,
) -> None:
    if args.json:
        record = {
            "checkpoint": str(args.checkpoint),
            "system": loaded.config.system,
            "block_size": block_size,
            "step": loaded.step,
            **result.to_dict(),
        }
        if variance is not None:
            record["variance"] = variance
        sys.stdout.write(json.dumps(record) + "\n")
        return
    summary = {f"val_{k}": v for k, v in result.to_dict().items()} | {"estimator": result.estimator}
    rows = {
        "model": f"{loaded.config.system}, S={block_size}, step {loaded.step}",
        "likelihood": likelihood_line(summary),
        "forwards": f"{result.forwards} a row",
    }
    if variance is not None:
        named = args.estimator in ("count", "bernoulli")
        estimator = args.estimator if named else loaded.config.noise.estimator
        rows["variance"] = f"{variance:.4f} (Var. NELBO, {estimator})"
    facts(console, f"Scored {args.checkpoint}", rows)
