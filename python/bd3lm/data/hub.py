"""Data sets by name: parquet and text files of the hub, or of a folder, as prepared directories.

``hub:NAME`` is one of :data:`KNOWN`, with its splits, text field and detokenizer;
``hub:PATH[:CONFIG]@SPLIT`` is any other data set of the hub (or a local folder) with a ``text``
field. Files come from the parquet branch that the hub keeps of every data set, else from the
repository itself (``_on_hub``); they are kept in the hub's cache. No code of a data set is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bd3lm import _core, hub
from bd3lm.data.prepare import prepare
from bd3lm.data.tokenizers import Tokenizer
from bd3lm.errors import ConfigError

PREFIX = "hub:"

PARQUET = "refs/convert/parquet"
"""Branch on which the hub keeps every data set as ``CONFIG/SPLIT/NNNN.parquet``."""

TEXT_FILE = re.compile(r"\.(parquet|((txt|jsonl|ndjson|json)(\.(gz|xz|zst))?))$")


@dataclass(frozen=True)
class HubData:
    """Place and format of a data set.

    Attributes:
        path: name on the hub, or a local folder.
        config: its configuration, or None.
        train: split to train on, or None; ``train[:-1000]`` is a part of one.
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

    def name(self, split: str) -> str:
        """The data set and a split of it, as they are named."""
        config = f":{self.config}" if self.config else ""
        return f"{PREFIX}{self.path}{config}@{split}"


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
    """Find the data set of a name after ``hub:``.

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

    Args:
        source: the data set.
        split: one of its splits, or a part of one: ``train[:-1000]``, ``test[10%:]``.
        tokenizer: makes the ids.
        out: directory to make.
        eos: end every document with EOS.

    Raises:
        ConfigError: it cannot be loaded here (no network, no such name or split).
        FormatError: it has no such field, or cannot be read.
    """
    name, start, stop = _parts_of(split, source)
    try:
        files = _files(source, name)
    except hub.HubError as error:
        allowed = f"a data set that can be loaded here ({error})"
        raise ConfigError("data", source.name(split), allowed) from None
    rows = None
    if start is not None or stop is not None:
        rows = _rows(start, stop, _count(files))
    prepare(
        files,
        tokenizer,
        out,
        text_field=source.field,
        rows=rows,
        detokenizer=source.detokenizer,
        eos=eos,
    )


def _parts_of(split: str, source: HubData) -> tuple[str, str | None, str | None]:
    """A split's name and the bounds of its part."""
    number = r"(-?\d+%?)?"
    match = re.fullmatch(rf"([^\[\]]+)(?:\[{number}:{number}\])?", split)
    if match is None:
        raise ConfigError("data", source.name(split), "SPLIT or SPLIT[FIRST:END] after the @")
    name, start, stop = match.groups()
    return name, start, stop


def _rows(start: str | None, stop: str | None, count: int) -> tuple[int, int]:
    """A part of ``count`` rows, by Python's rules for slices."""

    def absolute(bound: str | None) -> int | None:
        if bound is None or not bound.endswith("%"):
            return None if bound is None else int(bound)
        share = int(bound[:-1])
        return round(abs(share) / 100 * count) * (-1 if share < 0 else 1)

    first, end, _ = slice(absolute(start), absolute(stop)).indices(count)
    return first, max(first, end)


def _count(files: Sequence[Path]) -> int:
    if all(path.suffix == ".parquet" for path in files):
        return sum(_core.parquet_rows(str(path)) for path in files)
    reading = dict.fromkeys(("filter", "detokenizer", "format", "rows", "source", "chat"), None)
    plain = {"text_field": "text", "lines": False, "no_eos": False, "strict": False}
    return _core.count_records([str(path) for path in files], reading=reading | plain)


def _files(source: HubData, split: str) -> list[Path]:
    """The files of a split, in order, on this machine.

    Raises:
        hub.HubError: there are none, or the hub does not give them.
    """
    folder = Path(source.path)
    if folder.is_dir():
        inside = folder / source.config if source.config else folder
        if not inside.is_dir():
            raise hub.HubError(f"the folder has no {source.config}/")
        found = [path for path in inside.rglob("*") if path.is_file()]
        names = sorted(path.relative_to(inside).as_posix() for path in found)
        return [inside / name for name in _of_split(names, split)]
    chosen, revision = _on_hub(source, split)
    paths = []
    for name in chosen:
        path = hub.download(source.path, name, kind="dataset", revision=revision)
        if path is None:
            raise hub.HubError(f"{name} is gone")
        paths.append(path)
    return paths


def _on_hub(source: HubData, split: str) -> tuple[list[str], str | None]:
    """Names of a split's files, and the branch that holds them.

    A split that the parquet branch has under no configuration, or in part, is looked for among
    the files of the repository: ``HuggingFaceFW/fineweb-edu@10BT`` are those in ``sample/10BT``.
    """
    try:
        listed = hub.list_files(source.path, revision=PARQUET)
    except hub.HubError as error:
        if "404" not in str(error) and "not found" not in str(error).lower():
            raise
        return _of_split(sorted(hub.list_files(source.path)), split), None
    names = [name for name in map(_Converted.of, listed) if name]
    try:
        return _of_config(names, source.config, split), PARQUET
    except hub.HubError as refused:
        if source.config is not None or any(name.split == split for name in names):
            raise
        try:
            return _of_split(sorted(hub.list_files(source.path)), split), None
        except hub.HubError:
            raise refused from None


@dataclass(frozen=True, order=True)
class _Converted:
    """A file of the parquet branch."""

    config: str
    split: str
    name: str

    @classmethod
    def of(cls, name: str) -> _Converted | None:
        parts = name.split("/")
        if len(parts) != 3 or not name.endswith(".parquet"):
            return None
        return cls(parts[0], parts[1], name)


def _of_config(names: Sequence[_Converted], config: str | None, split: str) -> list[str]:
    """The files of one configuration's split."""
    configs = sorted({name.config for name in names})
    if config is None:
        usual = [name for name in ("default", "plain_text") if name in configs]
        if len(configs) != 1 and not usual:
            raise hub.HubError(f"one of its configurations must be named: {', '.join(configs)}")
        config = configs[0] if len(configs) == 1 else usual[0]
    mine = sorted(name for name in names if name.config == config)
    chosen = [name.name for name in mine if name.split == split]
    if not chosen:
        if any(name.split == f"partial-{split}" for name in mine):
            raise hub.HubError(f"the hub has converted only a part of {config}/{split} to parquet")
        splits = sorted({f"{name.config}@{name.split}" for name in mine or names})
        raise hub.HubError(f"it has no {config}@{split}, only {', '.join(splits) or 'no parquet'}")
    return chosen


def _of_split(names: Sequence[str], split: str) -> list[str]:
    """The text files whose name, or that of a folder above, is or begins with the split's."""
    is_split = re.compile(rf"(^|[/._-]){re.escape(split)}([/._-]|$)")
    texts = [name for name in names if TEXT_FILE.search(name)]
    chosen = [name for name in texts if is_split.search(name)]
    if not chosen:
        listed = ", ".join(texts[:10]) or "no text file"
        raise hub.HubError(f"no file of it is named after the split {split}; it holds {listed}")
    return chosen
