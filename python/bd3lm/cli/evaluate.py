"""``bd3lm eval``: the likelihood of a text under a checkpoint."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bd3lm.cli.common import PlainConsole, check_checkpoint, check_exists, parse, run
from bd3lm.config import (
    AttentionName,
    DetokenizerName,
    EstimatorName,
    LikelihoodName,
    ScheduleName,
    check_whole,
)
from bd3lm.storage import parse_bytes

if TYPE_CHECKING:
    from bd3lm.checkpoint import Checkpoint
    from bd3lm.ranks.group import Ranks


@dataclass(frozen=True)
class EvalArgs:
    """Score text under a checkpoint: perplexity and bits per byte, with standard errors.

    By default the figures come from the NELBO, an upper bound on the negative log-likelihood in
    nats a token, computed exactly up to block size 4 and estimated above. --likelihood marginal is
    the exact likelihood of the sampler up to block size 8.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run, a checkpoint in it, or a checkpoint of another implementation (a directory, a URL such
    as s3://bucket/run, or a name on the Hugging Face hub)."""
    tokenizer: str | None = None
    """Tokenizer of a checkpoint that carries none: a file, a folder or a hub name. None: gpt2."""
    data: str | None = None
    """A prepared data set (or a folder with its valid/), here or at a URL; a text file or
    hub:NAME. None: the validation data of the checkpoint's run."""
    cache_size: str = "10GB"
    """Largest local cache of the rows of a data set at a URL, for each process."""
    text_field: str = "text"
    """Field of jsonl and parquet records that holds the text."""
    lines: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A text file holds a document a line."""
    detokenizer: DetokenizerName | None = None
    """Rules that restore the original spelling of a tokenized benchmark text."""
    eos: bool = True
    """End documents of a text file with EOS. --no-eos: as in the zero-shot texts of the BD3-LM
    paper."""
    row_eos: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Close every row with an EOS that is scored, as the original implementation does. A run that
    was trained on such rows is always scored on them."""
    likelihood: LikelihoodName = "nelbo"
    """nelbo: an upper bound. marginal: exact for the first-hitting sampler, up to block size 8
    (2^S forwards a row). left-to-right, confidence: exact for a sampler that reveals in that order
    (S + 1 forwards). orders: an upper bound on the marginal from --repeats random orders."""
    estimator: Literal["auto"] | EstimatorName = "auto"
    """Estimator of the NELBO. auto: exact up to block size 4, stratified above. bernoulli: as in
    the BD3-LM paper."""
    block_size: int | None = None
    """Score with blocks of another size than the trained one."""
    as_ar: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Score a model with a causal clean stream as the autoregressive model that it also is."""
    repeats: int = 8
    """Forwards a row of the sampled estimators, or orders a row; the standard error falls with the
    root."""
    rows: int | None = None
    """Score so many rows, spread evenly over the text. None: all."""
    schedule: ScheduleName = "loglinear"
    """bernoulli: draw levels by this schedule, with the run's own parameters. It changes the
    standard error and not the bound."""
    variance: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also the variance of the loss between blocks (Var. NELBO). With --estimator count or
    bernoulli: of that estimator, over all levels. Otherwise of the training loss, under the run's
    own noise: its estimator, and its fixed or learned clip."""
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
    """Attention backend."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare a prepared data set with its digests even if that was done before and nothing
    changed."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        parse_bytes(self.cache_size)
        for name in ("batch_size", "repeats", "block_size", "rows", "stride"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name.replace("_", "-"), value, 1)


def main(argv: list[str] | None = None, prog: str = "bd3lm-eval") -> None:
    """Entry point of ``bd3lm-eval`` and ``bd3lm eval``."""
    run(lambda: evaluate(parse(EvalArgs, prog, argv)))


def evaluate(args: EvalArgs) -> None:
    """Load, score, print; the ranks of a job share the rows, and rank 0 prints."""
    check_checkpoint(args.checkpoint)
    if args.data is not None and not args.data.startswith("hub:"):
        check_exists(args.data)

    from bd3lm.ranks.group import joined

    with joined(args.device) as ranks:
        _evaluate(args, ranks)


def _evaluate(args: EvalArgs, ranks: Ranks) -> None:
    from bd3lm.checkpoint import load_checkpoint
    from bd3lm.cli.progress import bar
    from bd3lm.data.resolve import as_place
    from bd3lm.device import resolve_device
    from bd3lm.evaluate.score import Scoring, open_text

    console = PlainConsole(stderr=args.json)
    loaded = load_checkpoint(args.checkpoint, resolve_device(args.device), args.tokenizer)
    loaded = loaded.as_autoregressive() if args.as_ar else loaded
    named = args.estimator if args.estimator in ("count", "bernoulli") else None
    with tempfile.TemporaryDirectory() as work:
        data = open_text(
            loaded,
            None if args.data is None else as_place(args.data),
            Path(work),
            console.print if ranks.first else lambda _: None,
            text_field=args.text_field,
            lines=args.lines,
            detokenizer=args.detokenizer,
            eos=args.eos,
            verify=args.verify or "auto",
            cache_size=args.cache_size,
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
        with bar(console, shown=ranks.first) as progress:
            task = progress.add_task("scoring", total=len(scoring.rows))
            result = scoring.likelihood(
                args.likelihood,
                batch_size=args.batch_size,
                max_rows=args.rows,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
                ranks=ranks,
            )
        record = {
            "checkpoint": args.checkpoint,
            "system": loaded.config.system,
            "block_size": scoring.config.block,
            "step": loaded.step,
            **result.to_dict(),
        }
        if noise is not None:
            record["variance"] = scoring.variance(noise, args.batch_size, ranks)
    if not ranks.first:
        return
    if args.json:
        sys.stdout.write(json.dumps(record) + "\n")
    else:
        _report(record, named or loaded.config.noise.estimator, loaded, console)


def _report(
    record: dict[str, Any], estimator: str, loaded: Checkpoint, console: PlainConsole
) -> None:
    """Print two columns; ``estimator`` is that of the variance."""
    from bd3lm.cli.summary import facts, likelihood_line

    summary = {f"val_{k}": v for k, v in record.items()} | {"estimator": record["estimator"]}
    rows = {
        "model": f"{loaded.config.system}, S={record['block_size']}, step {loaded.step}",
        "likelihood": likelihood_line(summary),
        "forwards": f"{record['forwards']} a row",
    }
    if "variance" in record:
        rows["variance"] = f"{record['variance']:.4f} (Var. NELBO, {estimator})"
    facts(console, f"Scored {record['checkpoint']}", rows)
