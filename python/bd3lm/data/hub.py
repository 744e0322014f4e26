"""Data sets by name, through the ``datasets`` package (extra ``hub``).

``hub:NAME`` is one of :data:`KNOWN`, with its splits, text field and detokenizer;
``hub:PATH[:CONFIG]@SPLIT`` is any other data set of the hub (or a local folder) with a ``text``
field. A network is needed the first time.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3lm import hub
from bd3lm.data.prepare import prepare
from bd3lm.data.tokenizers import Tokenizer
from bd3lm.errors import ConfigError
from bd3lm.extras import require
from bd3lm.files import storage_errors

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
    """Tokenize one split into a prepared directory, in bounded memory.

    ``datasets`` keeps what it loads in its own cache. A compressed copy of the text lies beside
    ``out`` while it is tokenized.

    Args:
        source: the data set.
        split: one of its splits, slices allowed.
        tokenizer: what makes the ids.
        out: directory to make.
        eos: end every document with EOS.

    Raises:
        ConfigError: it cannot be loaded here (no network, no such name, split or field), or the
            connection broke.
        MissingPackageError: the extra ``hub`` is not installed.
    """
    where = f"{PREFIX}{source.path}@{split}"
    documents = _load(source, split)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        text = Path(folder) / "documents.jsonl.gz"
        with storage_errors(text):
            _write(documents, source.field, text, where)
        prepare([text], tokenizer, out, detokenizer=source.detokenizer, eos=eos)


def _load(source: HubData, split: str) -> Any:
    if not Path(source.path).exists():  # a local folder needs no network
        hub.connect()
    datasets: Any = require("datasets", "hub", "a data set of the hub")

    try:
        data = datasets.load_dataset(source.path, source.config, split=split)
    except Exception as error:  # the library and its hub raise dozens of kinds
        reason = hub.reason(error)
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


def _write(documents: Iterable[Mapping[str, Any]], field: str, file: Path, where: str) -> None:
    """Write the documents as compressed JSON lines; one without a text is left out."""
    records = iter(documents)
    with gzip.open(file, "wt", encoding="utf-8", compresslevel=1) as lines:
        while True:
            try:
                document = next(records, None)
            except Exception as error:  # of the library and its network
                allowed = f"a data set that reads to its end ({error})"
                raise ConfigError("data", where, allowed) from error
            if document is None:
                return
            if document[field] is not None:
                lines.write(json.dumps({"text": document[field]}, ensure_ascii=False) + "\n")
