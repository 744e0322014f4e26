"""``bd3lm-prepare``: text files to a data set that can be trained on and scored."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bd3lm.cli.common import run
from bd3lm.cli.summary import facts
from bd3lm.config import DetokenizerName, check
from bd3lm.data import Manifest, Tokenizer, load_tokenizer, prepare, read_documents, train_tokenizer


@dataclass(frozen=True)
class PrepareArgs:
    """Tokenize text into a data set, in parallel and in bounded memory.

    Reads .txt, .jsonl and .parquet, the first two also as .gz, .xz or .zst. The result holds
    tokens.bin and tokens.idx (Megatron's layout), manifest.json and tokenizer.json.
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Text files, read in this order."""
    out: Path
    """Directory to make."""
    tokenizer: str = "default"
    """default (the shipped byte-level BPE), a file, a folder or a hub name; train:SIZE makes a
    byte-level BPE of that size from the inputs."""
    text_field: str = "text"
    """Field of jsonl and parquet records that holds the text."""
    where: str | None = None
    """FIELD=VALUE: only records whose field has that value."""
    lines: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """txt: a document a line, instead of one a file."""
    detokenizer: DetokenizerName | None = None
    """Rules that put a tokenized benchmark text back as it was written, before it is tokenized."""
    eos: bool = True
    """End every document with EOS. --no-eos: they run into each other, as the paper's zero-shot
    texts do."""
    valid_fraction: float | None = None
    """Hold out that share of the documents: makes train/ and valid/."""
    threads: int | None = None
    """Threads that tokenize. None: one a core."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``bd3lm-prepare``."""
    run(lambda: prepare_command(tyro.cli(PrepareArgs, prog="bd3lm-prepare", args=argv)))


def prepare_command(args: PrepareArgs) -> None:
    """Read, tokenize, write, report."""
    console = Console()
    check(len(args.inputs) >= 1, "inputs", None, "at least one file")
    where = None
    if args.where is not None:
        field, separator, value = args.where.partition("=")
        check(bool(separator and field), "where", args.where, "FIELD=VALUE")
        where = (field, value)
    tokenizer = _tokenizer(args, where, console)
    started = time.perf_counter()
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        passes = 1 if args.valid_fraction is None else 2
        task = progress.add_task("", total=None, tokens=0)
        seen = [0, 0]  # passes begun, bytes read at the last call

        def told(read: int, total: int, tokens: int) -> None:
            if read < seen[1]:
                seen[0] += 1
            seen[1] = read
            progress.update(
                task, total=passes * total, completed=seen[0] * total + read, tokens=tokens
            )

        manifests = prepare(
            args.inputs,
            tokenizer,
            args.out,
            text_field=args.text_field,
            where=where,
            lines=args.lines,
            detokenizer=args.detokenizer,
            eos=args.eos,
            valid_fraction=args.valid_fraction,
            threads=args.threads,
            progress=told,
        )
    seconds = time.perf_counter() - started
    facts(console, f"Prepared {args.out}", _report(manifests, tokenizer, seconds))


def _tokenizer(args: PrepareArgs, where: tuple[str, str] | None, console: Console) -> Tokenizer:
    kind, _, size = args.tokenizer.partition(":")
    if kind != "train":
        return load_tokenizer(args.tokenizer)
    check(size.isdigit(), "tokenizer", args.tokenizer, "train:SIZE with a whole number")
    console.print(f"learning a byte-level BPE of {int(size):,} ids from the inputs")
    texts = (
        text
        for path in args.inputs
        for text in read_documents(path, text_field=args.text_field, where=where, lines=args.lines)
    )
    return train_tokenizer(texts, int(size))


def _report(manifests: list[Manifest], tokenizer: Tokenizer, seconds: float) -> dict[str, str]:
    names = ["train", "valid"] if len(manifests) == 2 else ["documents"]
    rows = {
        name: f"{m.num_documents:,} documents, {m.num_tokens:,} tokens ({m.dtype}), "
        f"{m.num_bytes:,} bytes of text, {m.num_bytes / m.num_tokens:.2f} bytes a token"
        for name, m in zip(names, manifests, strict=True)
    }
    tokens = sum(m.num_tokens for m in manifests)
    rows["tokenizer"] = (
        f"{tokenizer.name}: {tokenizer.vocab_size:,} ids, BOS {tokenizer.bos_id}, "
        f"EOS {tokenizer.eos_id}, mask {tokenizer.mask_id}"
    )
    rows["time"] = f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    return rows
