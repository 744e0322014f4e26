"""Text files to prepared data sets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bd3lm import _core
from bd3lm.data.store import Manifest
from bd3lm.data.tokenizers import Tokenizer
from bd3lm.errors import ConfigError, ExistsError
from bd3lm.files import storage_errors

HIDDEN = ".partial"
"""Name, or end of the name, of what is being written."""
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

    Everything is written to a hidden folder, both sides of a split included, and renamed at the
    end: ``out`` is whole or not there. A killed process may leave the hidden folder; the next one
    with the same ``out`` removes it and starts again.

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
        threads: that tokenize; None: one for each processor that this process may use.
        progress: told how far it is.

    Returns:
        The manifest, or those of train and valid.

    Raises:
        ExistsError: ``out`` already holds something.
        FormatError: a file or record that cannot be read.
        EmptyCorpusError: no text at all, or none on one side of the split.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(child.name != HIDDEN for child in out.iterdir())):
        held = "already exists" if out.is_dir() else "is a file"
        raise ExistsError(f"{out} {held}; choose another output or remove it first")
    if valid_fraction is not None and not 0.0 < valid_fraction < 1.0:
        raise ConfigError("valid-fraction", valid_fraction, "above 0 and below 1")
    sides: list[tuple[str, tuple[float, bool] | None]] = [("", None)]
    if valid_fraction is not None:
        sides = [("train", (valid_fraction, False)), ("valid", (valid_fraction, True))]
    manifests = []
    with _staged(out) as staged:
        for side, hold_out in sides:
            text = _core.prepare(
                [str(path) for path in inputs],
                str(staged / side) if side else str(staged),
                tokenizer.json,
                tokenizer.special,
                text_field=text_field,
                filter=where,
                lines=lines,
                detokenizer=detokenizer,
                no_eos=not eos,
                hold_out=hold_out,
                threads=threads or available_processors(),
                progress=progress,
            )
            manifests.append(Manifest.from_json(text))
    return manifests


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder to be made, whose content becomes that of ``out`` if the block ends without error.

    It lies in a hidden sibling of a new ``out``, and is renamed. An empty folder that exists is
    kept, for it may be a link, a mount or the current folder: then it lies in a hidden folder
    inside, and its files are moved up, the manifest last.
    """
    fresh = not out.exists()
    hidden = out.with_name(f".{out.name}{HIDDEN}") if fresh else out / HIDDEN
    new_parents = [parent for parent in out.parents if not parent.exists()]
    staged = hidden / "data"
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        yield staged
        with storage_errors(out):
            if fresh:
                staged.rename(out)
            else:
                names = sorted(os.listdir(staged), key=lambda name: name == "manifest.json")
                for name in names:
                    (staged / name).rename(out / name)
        shutil.rmtree(hidden, ignore_errors=True)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # another process may use it by now
                parent.rmdir()
        raise


def available_processors() -> int:
    """Processors that this process may use, by its affinity."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
