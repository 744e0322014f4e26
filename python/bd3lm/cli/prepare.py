"""``bd3lm prepare``: text files to a data set for training and scoring."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bd3lm.cli.common import PlainConsole, parse, run
from bd3lm.config import DetokenizerName, check, check_number, check_whole

if TYPE_CHECKING:
    from bd3lm.data import Manifest, Tokenizer


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
    """Rules that restore the original spelling of a tokenized benchmark text, before tokenizing."""
    eos: bool = True
    """End every document with EOS. --no-eos: documents run into each other, as in the zero-shot
    texts of the BD3-LM paper."""
    valid_fraction: float | None = None
    """Hold out that share of the documents: makes train/ and valid/."""
    threads: int | None = None
    """Threads that tokenize. None: one for each processor that this process may use."""

    def __post_init__(self) -> None:
        check(len(self.inputs) >= 1, "inputs", None, "at least one file")
        if self.valid_fraction is not None:
            check_number("valid-fraction", self.valid_fraction, 0, 1, interval="()")
        if self.threads is not None:
            check_whole("threads", self.threads, 1, 1024)
        if self.where is not None:
            field, separator, _ = self.where.partition("=")
            check(bool(separator and field), "where", self.where, "FIELD=VALUE")


def main(argv: list[str] | None = None, prog: str = "bd3lm-prepare") -> None:
    """Entry point of ``bd3lm-prepare`` and ``bd3lm prepare``."""
    run(lambda: prepare_command(parse(PrepareArgs, prog, argv)))


def prepare_command(args: PrepareArgs) -> None:
    """Read, tokenize, write, report."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from bd3lm.cli.summary import facts
    from bd3lm.data import prepare

    console = PlainConsole()
    where = None
    if args.where is not None:
        field, _, value = args.where.partition("=")
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
    show = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not show) as progress:
        passes = 1 if args.valid_fraction is None else 2
        task = progress.add_task("", total=None, tokens=0)
        seen = [0, 0]  # passes begun, bytes read at the last call

        def update(read: int, total: int, tokens: int) -> None:
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
            progress=update,
        )
    seconds = time.perf_counter() - started
    facts(console, f"Prepared {args.out}", _report(args, manifests, tokenizer, seconds))


def _tokenizer(
    args: PrepareArgs, where: tuple[str, str] | None, console: PlainConsole
) -> Tokenizer:
    """Load the tokenizer, or make one of the inputs."""
    from bd3lm.data import load_tokenizer, read_documents, train_tokenizer

    kind, _, size = args.tokenizer.partition(":")
    if kind != "train":
        return load_tokenizer(args.tokenizer)
    whole = size.isascii() and size.isdigit() and len(size) < 10
    check(whole, "tokenizer", args.tokenizer, "train:SIZE with a whole number")
    console.print(f"learning a byte-level BPE of {int(size):,} ids from the inputs")
    texts = (
        text
        for path in args.inputs
        for text in read_documents(path, text_field=args.text_field, where=where, lines=args.lines)
    )
    return train_tokenizer(texts, int(size))


def _report(
    args: PrepareArgs, manifests: list[Manifest], tokenizer: Tokenizer, seconds: float
) -> dict[str, str]:
    from bd3lm.cli.summary import command

    names = ["train", "valid"] if len(manifests) == 2 else ["documents"]
    rows = {
        name: f"{m.num_documents:,} documents, {m.num_tokens:,} tokens ({m.dtype}), "
        f"{m.num_bytes:,} bytes of text, {m.num_bytes / max(m.num_tokens, 1):.2f} bytes a token"
        for name, m in zip(names, manifests, strict=True)
    }
    tokens = sum(m.num_tokens for m in manifests)
    rows["tokenizer"] = (
        f"{tokenizer.name}: {tokenizer.vocab_size:,} ids, BOS {tokenizer.bos_id}, "
        f"EOS {tokenizer.eos_id}, mask {tokenizer.mask_id}"
    )
    rows["time"] = f"{seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
    if len(manifests) == 2:
        rows["next"] = command("bd3lm-train", "--data", args.out)
    return rows
