"""Text files to prepared data sets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bd3lm import _core
from bd3lm.data.store import Manifest
from bd3lm.data.tokenizers import Tokenizer
from bd3lm.errors import ConfigError, ExistsError

Progress = Callable[[int, int, int], None]
"""``(bytes read, bytes in all, tokens written)``; may raise to stop."""


def prepare(
    inputs: Sequence[Path | str],
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    text_field: str = "text",
    where: tuple[str, str] | None = None,
    lines: bool = False,
    detokenizer: str | None = None,
    eos: bool = True,
    valid_fraction: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Manifest]:
    """Tokenize text files into a data set, in parallel and in bounded memory.

    Everything is written to a hidden sibling of ``out``, both sides of a split included, and
    renamed at the end: ``out`` is whole or not there. What a killed process left under the hidden
    name is removed by the next one with the same ``out``, which begins anew.

    Args:
        inputs: txt, jsonl or parquet files, the first two also as .gz, .xz or .zst.
        tokenizer: what makes the ids.
        out: directory to make; must not exist, or be empty.
        text_field: field of jsonl and parquet records that holds the text.
        where: ``(field, value)``: only records whose field has that value.
        lines: txt: a document a line, instead of one a file.
        detokenizer: rules that put a tokenized benchmark text back as it was written: lm1b,
            wikitext, ptb, lambada or scientific_papers. Bytes are counted after them.
        eos: end every document with EOS; without it they run into each other, as the paper's
            zero-shot texts do.
        valid_fraction: hold out that share of the documents, by a fixed hash of their number:
            ``out`` then holds ``train/`` and ``valid/``.
        threads: that tokenize; None: one a core.
        progress: told how far it is.

    Returns:
        The manifest, or those of train and valid.

    Raises:
        ExistsError: ``out`` already holds something.
        FormatError: a file or record that cannot be read.
        EmptyCorpusError: no text at all, or none on one side of the split.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExistsError(f"{out} already exists; choose another output or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    if valid_fraction is None:
        splits: list[tuple[Path, tuple[float, bool] | None]] = [(out, None)]
    elif 0.0 < valid_fraction < 1.0:
        splits = [
            (partial / "train", (valid_fraction, False)),
            (partial / "valid", (valid_fraction, True)),
        ]
    else:
        raise ConfigError("valid-fraction", valid_fraction, "above 0 and below 1")
    fresh = not out.exists()
    if not fresh:
        out.rmdir()  # the writer makes it, whole
    new_parents = [parent for parent in out.parents if not parent.exists()]
    manifests = []
    try:
        if len(splits) == 2 and partial.exists():
            shutil.rmtree(partial)
        for target, hold_out in splits:
            text = _core.prepare(
                [str(path) for path in inputs],
                str(target),
                tokenizer.json,
                tokenizer.special,
                text_field=text_field,
                filter=where,
                lines=lines,
                detokenizer=detokenizer,
                no_eos=not eos,
                hold_out=hold_out,
                threads=threads or os.cpu_count() or 1,
                progress=progress,
            )
            manifests.append(Manifest.from_json(text))
        if len(splits) == 2:
            partial.rename(out)
    except BaseException:
        if len(splits) == 2:
            shutil.rmtree(partial, ignore_errors=True)
        if not fresh:
            out.mkdir(exist_ok=True)
        for parent in new_parents:
            with suppress(OSError):  # someone else may use it by now
                parent.rmdir()
        raise
    return manifests


def detokenize(name: str, text: str) -> str:
    """A tokenized benchmark text as it was written, by the rules that the paper's code applies.

    Args:
        name: lm1b, wikitext, ptb, lambada or scientific_papers.
        text: one document.

    Raises:
        ConfigError: there are no such rules.

    >>> detokenize("lm1b", "It 's late , isn 't it ?")
    "It's late, isn't it?"
    """
    return _core.detokenize(name, text)


def read_documents(
    path: Path | str,
    *,
    text_field: str = "text",
    where: tuple[str, str] | None = None,
    lines: bool = False,
) -> list[str]:
    """Documents of one text file, all in memory; see :func:`prepare` for the arguments.

    Raises:
        FormatError: a file or record that cannot be read.
    """
    documents: list[str] = []
    _core.for_each_document(
        str(path), documents.append, text_field=text_field, filter=where, lines=lines
    )
    return documents
