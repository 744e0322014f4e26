"""``bd3lm prepare``: text files to a data set for training and scoring."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import tyro

from bd3lm.cli.common import PlainConsole, parse, run
from bd3lm.config import DetokenizerName, check, check_number, check_whole

if TYPE_CHECKING:
    from bd3lm.data import Manifest, Tokenizer
    from bd3lm.data.store import Records


@dataclass(frozen=True)
class PrepareArgs:
    """Tokenize text into a data set, in parallel and in bounded memory.

    Reads .txt, .jsonl, .ndjson, .json and .parquet, all but the last also as .gz, .xz or .zst,
    folders of them, and - for standard input. The result holds tokens.bin and tokens.idx
    (Megatron's layout), manifest.json and tokenizer.json. Records that cannot be read are skipped
    and counted.
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Text files and folders, read in this order; - is standard input."""
    out: Path
    """Directory to make."""
    tokenizer: str = "default"
    """default (the shipped byte-level BPE), a file, a folder or a hub name; train:SIZE makes a
    byte-level BPE of that size from the inputs."""
    text_field: str = "text"
    """Field of JSON and parquet records that holds the text; a.b is field b of field a."""
    chat_template: Path | None = None
    """File with a chat template in Jinja. None: the tokenizer's own, if it has one."""
    loss_on: Literal["responses", "all"] = "responses"
    """Tokens that are trained on and scored where a field of JSON records is a chat, a list of
    messages: responses, each a document behind its prompt, or all."""
    where: str | None = None
    """FIELD=VALUE: only records whose field has that value; numbers, true, false and null as in
    JSON."""
    format: Literal["txt", "jsonl", "json", "parquet"] | None = None
    """Format of all inputs. None: by their names, or by their first bytes."""
    strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Stop at the first record that cannot be read, instead of skipping and counting it."""
    lines: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """txt: a document a line, instead of one a file or between <|endoftext|> lines."""
    detokenizer: DetokenizerName | None = None
    """Rules that restore the original spelling of a tokenized benchmark text, before tokenizing."""
    eos: bool = True
    """End every document with EOS. --no-eos: documents run into each other, as in the zero-shot
    texts of the BD3-LM paper."""
    valid_fraction: float | None = None
    """Hold out that share of the documents, at least one, or the tail of a single document: makes
    train/ and valid/."""
    shards: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make a shard of each file, joined by a manifest. After an interruption the same command makes
    the shards that are missing."""
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
    from bd3lm.data import prepare, prepare_shards

    console = PlainConsole()
    reading = _reading(args)
    tokenizer = _tokenizer(args, reading, console)
    if args.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(args.chat_template)
    started = time.perf_counter()
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    show = console.is_terminal
    bar = Progress(*columns, console=console, transient=True, disable=not show)
    with stopped_by_signals(), bar as progress:
        task = progress.add_task("", total=None, tokens=0)

        def update(read: int, total: int, tokens: int) -> None:
            # A pipe has no size.
            progress.update(task, total=total or None, completed=read, tokens=tokens)

        settings = {
            **reading,
            "loss_on": args.loss_on,
            "detokenizer": args.detokenizer,
            "eos": args.eos,
            "valid_fraction": args.valid_fraction,
            "threads": args.threads,
            "progress": update,
        }
        if args.shards:
            manifests = [prepare_shards(args.inputs, tokenizer, args.out, **settings)]
        else:
            manifests = prepare(args.inputs, tokenizer, args.out, **settings)
    seconds = time.perf_counter() - started
    facts(console, f"Prepared {args.out}", _report(args, manifests, tokenizer, seconds))


class _Reading(TypedDict):
    text_field: str
    where: tuple[str, str] | None
    lines: bool
    format: str | None
    strict: bool


def _reading(args: PrepareArgs) -> _Reading:
    """The settings that decide which documents there are."""
    where = None
    if args.where is not None:
        field, _, value = args.where.partition("=")
        where = (field, value)
    return {
        "text_field": args.text_field,
        "where": where,
        "lines": args.lines,
        "format": args.format,
        "strict": args.strict,
    }


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Remove partial files when a signal ends the process; exit with 128 + its number.

    A signal that is ignored, as by nohup, stays ignored.
    """
    before: dict[signal.Signals, Any] = {}

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        kind = getattr(signal, name, None)
        if kind is not None and signal.getsignal(kind) is signal.SIG_DFL:
            before[kind] = signal.signal(kind, stop)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _tokenizer(args: PrepareArgs, reading: _Reading, console: PlainConsole) -> Tokenizer:
    """Load the tokenizer, or train one on the inputs."""
    from bd3lm.data import load_tokenizer, train_tokenizer
    from bd3lm.data.prepare import STDIN, iter_documents

    kind, _, size = args.tokenizer.partition(":")
    if kind != "train":
        return load_tokenizer(args.tokenizer)
    whole = size.isascii() and size.isdigit() and len(size) < 10
    check(whole, "tokenizer", args.tokenizer, "train:SIZE with a whole number")
    for path in args.inputs:
        again = str(path) != STDIN and (path.is_file() or path.is_dir() or not path.exists())
        check(again, "tokenizer", args.tokenizer, f"a tokenizer: {path} cannot be read twice")
    console.print(f"training a byte-level BPE of {int(size):,} ids on the inputs")
    documents = iter_documents(args.inputs, **reading)
    return train_tokenizer((text for text, _ in documents), int(size))


def _report(
    args: PrepareArgs, manifests: list[Manifest], tokenizer: Tokenizer, seconds: float
) -> dict[str, str]:
    from bd3lm.cli.summary import command

    names = ["train", "valid"] if len(manifests) == 2 else ["documents"]
    rows = {
        name: f"{m.num_documents:,} {'document' if m.num_documents == 1 else 'documents'}, "
        f"{m.num_tokens:,} tokens ({m.dtype}), {m.num_bytes:,} bytes of text, "
        f"{m.num_bytes / max(m.num_tokens - m.num_prompt_tokens, 1):.2f} bytes a token"
        for name, m in zip(names, manifests, strict=True)
    }
    tokens = sum(m.num_tokens for m in manifests)
    prompts = sum(m.num_prompt_tokens for m in manifests)
    if prompts:
        rows["prompts"] = f"{prompts:,} of the tokens: clean, and never scored"
    rows["tokenizer"] = (
        f"{tokenizer.name}: {tokenizer.vocab_size:,} ids, BOS {tokenizer.bos_id}, "
        f"EOS {tokenizer.eos_id}, mask {tokenizer.mask_id}"
    )
    rows |= _records(manifests[0].records)
    rows["time"] = f"{seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
    if len(manifests) == 2:
        rows["next"] = command("bd3lm-train", "--data", args.out)
    return rows


def _records(records: Records | None) -> dict[str, str]:
    """The records that were not taken as they are."""
    if records is None:
        return {}
    counts = {
        "filtered out": records.filtered,
        "empty": records.empty,
        "null": records.null,
        "not readable": records.bad,
    }
    left_out = [f"{count:,} {cause}" for cause, count in counts.items() if count]
    rows = {}
    if left_out:
        rows["left out"] = f"{', '.join(left_out)}, of {records.read:,} records"
    if records.first_bad:
        rows["not readable"] = f"first: {records.first_bad}"
    if records.repaired:
        rows["repaired"] = f"{records.repaired:,} with half a surrogate pair, now U+FFFD"
    if records.long:
        rows["in parts"] = f"{records.long:,} longer than 64 MiB"
    return rows
