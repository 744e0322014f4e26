"""Text files to prepared data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bd3lm import _core
from bd3lm.data.chat import LossOn, chat_reader
from bd3lm.data.store import Manifest
from bd3lm.data.tokenizers import Tokenizer
from bd3lm.errors import ConfigError

Progress = Callable[[int, int, int], None]
"""``(bytes read, bytes in all, tokens written)``; may raise to stop."""

STDIN = "-"
"""The name of standard input."""


def prepare(
    inputs: Sequence[Path | str],
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    text_field: str = "text",
    loss_on: LossOn = "responses",
    where: tuple[str, str] | None = None,
    lines: bool = False,
    format: str | None = None,
    strict: bool = False,
    rows: tuple[int, int] | None = None,
    detokenizer: str | None = None,
    eos: bool = True,
    valid_fraction: float | None = None,
    threads: int | None = None,
    source: str | None = None,
    progress: Progress | None = None,
) -> list[Manifest]:
    """Tokenize text files into a data set, in parallel and in bounded memory.

    The files are written under a hidden name, both sides of a split included, synced to the disk
    and renamed at the end: ``out`` is whole or not there. Another process that makes the same
    ``out`` is refused. A killed process leaves a hidden folder, which the next one replaces.

    A record that cannot be read is skipped and counted in :attr:`Manifest.records`, as are empty
    and null texts. A plain text longer than 64 MiB is tokenized in parts, cut where that does not
    change the ids of a byte-level BPE or WordPiece; a longer record of JSON or parquet is skipped.

    Args:
        inputs: txt, jsonl, json or parquet files, all but the last also as .gz, .xz or .zst;
            folders of them; ``-`` is standard input. In a txt file, ``<|endoftext|>`` separates
            documents.
        tokenizer: makes the ids.
        out: directory to make; must not exist, or be empty.
        text_field: field of JSON and parquet records that holds the text; ``a.b`` is field ``b``
            of field ``a``. A JSON field may also hold a chat, a list of messages with ``role`` and
            ``content``, if the tokenizer has a chat template.
        loss_on: tokens of a chat that are noised and scored: responses, each a document behind its
            prompt (:meth:`bd3lm.data.ChatTemplate.exchanges`), or all.
        where: ``(field, value)``: only records whose field has that value. Numbers, booleans and
            null are written as in JSON.
        lines: txt: a document a line, instead of one a file.
        format: txt, jsonl, json or parquet for all files; None: by their names, or by their first
            bytes where they have no extension.
        strict: raise for the first record that cannot be read.
        rows: ``(first, end)``: only these records of all files together.
        detokenizer: rules that put a tokenized benchmark text back as it was written: lm1b,
            wikitext, ptb, lambada or scientific_papers. Bytes are counted after them.
        eos: end every document with EOS; without it they run into each other, as the paper's
            zero-shot texts do.
        valid_fraction: hold out that share of the documents, by a fixed hash of their number, but
            at least one: ``out`` then holds ``train/`` and ``valid/``. The tail of a single
            document is held out.
        threads: that tokenize, 1 to 1024; None: one a core that this process may use.
        source: name of the source in the manifest, for a pipe; None: the inputs.
        progress: called now and then.

    Returns:
        The manifest, or those of train and valid.

    Raises:
        ConfigError: a setting outside its range.
        ExistsError: ``out`` already holds something, or another process is making it.
        FormatError: a file that cannot be read, or in which no record can.
        EmptyCorpusError: no text at all, or a single document too short to be divided.
    """
    threads = available_threads() if threads is None else threads
    if not 1 <= threads <= 1024:
        raise ConfigError("threads", threads, "1 to 1024")
    if valid_fraction is not None and not 0.0 < valid_fraction < 1.0:
        raise ConfigError("valid-fraction", valid_fraction, "above 0 and below 1")
    chat = None
    if tokenizer.chat_template is not None:
        chat = chat_reader(tokenizer, text_field, loss_on, eos=eos)
    manifests = _core.prepare(
        [str(path) for path in inputs],
        # The working directory may be given as ".", which has no name to write a sibling of.
        str(out),
        tokenizer.json,
        tokenizer.special,
        reading=_reading(
            text_field=text_field,
            where=where,
            lines=lines,
            format=format,
            strict=strict,
            rows=rows,
            detokenizer=detokenizer,
            no_eos=not eos,
            source=source,
            chat=chat,
        ),
        held_out=valid_fraction,
        threads=threads,
        progress=progress,
    )
    return [Manifest.from_json(text) for text in manifests]


def available_threads() -> int:
    """Threads that this process may run at once, by its affinity and its cgroup's quota."""
    return _core.available_threads()


def detokenize(name: str, text: str) -> str:
    """Put a tokenized benchmark text back as it was written, by the rules of the paper's code.

    Args:
        name: lm1b, wikitext, ptb, lambada or scientific_papers.
        text: one document.

    Raises:
        ConfigError: there are no such rules.

    Examples:
        >>> detokenize("lm1b", "It 's late , isn 't it ?")
        "It's late, isn't it?"
    """
    return _core.detokenize(name, text)


def iter_documents(
    inputs: Sequence[Path | str],
    *,
    text_field: str = "text",
    where: tuple[str, str] | None = None,
    lines: bool = False,
    format: str | None = None,
    strict: bool = False,
    rows: tuple[int, int] | None = None,
) -> Iterator[tuple[str, bool]]:
    """Read documents in bounded memory; see :func:`prepare` for the arguments.

    Yields:
        Text and whether its document ends there: one longer than 64 MiB comes in parts.

    Raises:
        FormatError: a file that cannot be read, or in which no record can.
    """
    reading = _reading(
        text_field=text_field, where=where, lines=lines, format=format, strict=strict, rows=rows
    )
    return iter(_core.Documents([str(path) for path in inputs], reading=reading))


def read_documents(
    path: Path | str,
    *,
    text_field: str = "text",
    where: tuple[str, str] | None = None,
    lines: bool = False,
) -> list[str]:
    """Read all documents of a file or folder into memory; see :func:`prepare` for the arguments.

    Raises:
        FormatError: a file that cannot be read, or in which no record can.
    """
    documents: list[str] = []
    begun: list[str] = []
    for text, last in iter_documents([path], text_field=text_field, where=where, lines=lines):
        begun.append(text)
        if last:
            documents.append("".join(begun))
            begun.clear()
    return documents


def _reading(
    *,
    text_field: str,
    where: tuple[str, str] | None,
    lines: bool,
    format: str | None,
    strict: bool,
    rows: tuple[int, int] | None,
    detokenizer: str | None = None,
    no_eos: bool = False,
    source: str | None = None,
    chat: Callable[[str], list[tuple[str, str]]] | None = None,
) -> Mapping[str, object]:
    """The settings of a reader, as Rust takes them."""
    return {
        "text_field": text_field,
        "filter": where,
        "lines": lines,
        "format": format,
        "strict": strict,
        "rows": rows,
        "detokenizer": detokenizer,
        "no_eos": no_eos,
        "source": source,
        "chat": chat,
    }
