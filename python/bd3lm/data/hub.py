"""Data sets by name, through the ``datasets`` package: streamed into a prepared directory.

``hub:NAME`` is one of :data:`KNOWN`, with its splits, text field and detokenizer;
``hub:PATH[:CONFIG]@SPLIT`` is any other data set of the hub (or a local folder) with a ``text``
field. A network is needed the first time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3lm.data.prepare import prepare
from bd3lm.data.tokenizers import Tokenizer
from bd3lm.errors import ConfigError

PREFIX = "hub:"


@dataclass(frozen=True)
class HubData:
    """Where a data set is and how it is read.

    Attributes:
        path: as ``datasets.load_dataset`` takes it.
        config: its configuration, or None.
        train: split to train on, or None.
        valid: split to validate or score on, or None.
        field: of the text.
        detokenizer: rules that put the text back, or None.
    """

    path: str
    config: str | None = None
    train: str | None = None
    valid: str | None = None
    field: str = "text"
    detokenizer: str | None = None


KNOWN: Mapping[str, HubData] = {
    "lm1b": HubData("lm1b", None, "train", "test", detokenizer="lm1b"),
    # The paper's split: the last 100,000 documents validate.
    "openwebtext": HubData("openwebtext", None, "train[:-100000]", "train[-100000:]"),
    "wikitext2": HubData(
        "wikitext", "wikitext-2-raw-v1", "train", "validation", detokenizer="wikitext"
    ),
    "wikitext103": HubData(
        "wikitext", "wikitext-103-raw-v1", "train", "validation", detokenizer="wikitext"
    ),
    "ptb": HubData(
        "ptb_text_only", None, "train", "validation", field="sentence", detokenizer="ptb"
    ),
    # OpenAI's plain text, which the paper's code downloads; "lambada" itself is tokenized.
    "lambada": HubData("EleutherAI/lambada_openai", None, None, "test", detokenizer="lambada"),
    "ag_news": HubData("ag_news", None, "train", "test"),
    "scientific_papers_pubmed": HubData(
        "scientific_papers", "pubmed", None, "validation", "article", "scientific_papers"
    ),
    "scientific_papers_arxiv": HubData(
        "scientific_papers", "arxiv", None, "validation", "article", "scientific_papers"
    ),
}
"""The paper's data sets by the names its code uses. Not all of them are still served under these
paths: give another by ``hub:PATH@SPLIT``."""


def named(name: str) -> HubData:
    """What a name after ``hub:`` stands for.

    Raises:
        ConfigError: neither a known name nor PATH[:CONFIG]@SPLIT.
    """
    if name in KNOWN:
        return KNOWN[name]
    place, at, split = name.rpartition("@")
    if not at or not place or not split:
        allowed = f"hub: and one of {', '.join(KNOWN)}, or hub:PATH[:CONFIG]@SPLIT"
        raise ConfigError("data", PREFIX + name, allowed)
    path, _, config = place.partition(":")
    return HubData(path, config or None, train=split, valid=None)


def prepare_split(
    source: HubData, split: str, tokenizer: Tokenizer, out: Path, *, eos: bool = True
) -> None:
    """Stream one split into a prepared directory, in bounded memory.

    ``datasets`` keeps what it loads in its own cache; no other copy of the text is made.

    Args:
        source: the data set.
        split: one of its splits, slices allowed.
        tokenizer: what makes the ids.
        out: directory to make.
        eos: end every document with EOS.

    Raises:
        ConfigError: it cannot be loaded here (no network, no such name, split or field).
    """
    documents = _load(source, split)
    with tempfile.TemporaryDirectory() as folder:
        pipe = Path(folder) / f"{source.path.replace('/', '-')}-{split}.jsonl"
        os.mkfifo(pipe)
        failed: list[Exception] = []
        arguments = (documents, source.field, pipe, failed)
        writer = threading.Thread(target=_write, args=arguments, daemon=True)
        writer.start()
        try:
            prepare([pipe], tokenizer, out, detokenizer=source.detokenizer, eos=eos)
        finally:
            _release(pipe)
            writer.join()
    if failed:  # what was read so far looked like all there is
        shutil.rmtree(out, ignore_errors=True)
        where = f"{PREFIX}{source.path}@{split}"
        raise ConfigError("data", where, f"a data set that reads to its end ({failed[0]})")


def _load(source: HubData, split: str) -> Any:
    import datasets  # seconds to import: only where it is asked for

    try:
        data = datasets.load_dataset(source.path, source.config, split=split)
    except Exception as error:  # the library and its hub raise dozens of kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        where = source.path + (f":{source.config}" if source.config else "")
        raise ConfigError(
            "data", f"{PREFIX}{where}@{split}", f"a data set that can be loaded here ({reason})"
        ) from error
    columns = data.column_names
    if source.field not in columns:
        raise ConfigError(
            "data",
            f"{PREFIX}{source.path}",
            f"a data set with a field {source.field}; it has {columns}",
        )
    return data


def _write(
    documents: Iterable[Mapping[str, Any]], field: str, pipe: Path, failed: list[Exception]
) -> None:
    try:
        with pipe.open("w", encoding="utf-8") as lines:
            for document in documents:
                lines.write(json.dumps({"text": document[field]}, ensure_ascii=False) + "\n")
    except BrokenPipeError:
        pass  # the reader has met an error of its own, which is the one to report
    except Exception as error:
        failed.append(error)


def _release(pipe: Path) -> None:
    """Let a writer go that still waits for a reader, which failed before it opened the pipe."""
    try:
        os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return
