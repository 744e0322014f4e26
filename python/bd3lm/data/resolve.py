"""Opening of the data that a user names: nothing, a prepared directory or text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, TypedDict

from bd3lm.data.hub import PREFIX, named, prepare_split
from bd3lm.data.prepare import STDIN, prepare
from bd3lm.data.remote import CACHE_SIZE
from bd3lm.data.store import Dataset, Manifest
from bd3lm.data.tokenizers import Tokenizer, load_tokenizer
from bd3lm.errors import ConfigError, MissingFileError
from bd3lm.storage import Remote, is_url

HELD_OUT = 0.05
MANIFEST = "manifest.json"

Verify = bool | Literal["auto"]
"""Time of a data set's verification; see :class:`bd3lm.data.Dataset`."""


Place = Path | str
"""A path, or the URL of a prepared directory."""


class _Opening(TypedDict):
    verify: Verify
    cache_size: int | str


class _Options(_Opening):
    text_field: str


@dataclass(frozen=True)
class Splits:
    """Training and validation data with one tokenizer."""

    train: Dataset
    valid: Dataset


def open_splits(
    data: str | None,
    valid: str | None,
    tokenizer: str,
    work: Path,
    note: Callable[[str], None],
    *,
    text_field: str = "text",
    verify: Verify = "auto",
    cache_size: int | str = CACHE_SIZE,
) -> Splits:
    """Open the data that is named, tokenizing text into ``work`` where that has not been done.

    Nothing named: the corpus shipped with the package. A directory with ``train/`` and
    ``valid/``: those. A prepared data set needs ``valid``, which may be text; a text file or a
    folder of them has a share held out. Prepared data may be at a URL.

    Args:
        data: training data, or None.
        valid: validation data, or None.
        tokenizer: name or path, for text.
        work: directory for text that has to be tokenized.
        note: called with a line on each step.
        text_field: field of JSON and parquet records that holds the text.
        verify: when the data sets are verified.
        cache_size: bytes of the local cache of each data set at a URL.

    Raises:
        MissingFileError: a path that does not exist.
        NotADatasetError: a directory that is not a prepared data set.
        ConfigError: validation data is missing and cannot be made, or the tokenizer that is named
            is not that of the prepared data.
    """
    opening: _Opening = {"verify": verify, "cache_size": cache_size}
    if data is None:
        return _default(tokenizer, work, note, verify)
    if data.startswith(PREFIX):
        return _from_hub(data.removeprefix(PREFIX), valid, tokenizer, work, note, verify)
    train = as_place(data)
    has_splits = _has_splits(train)
    if valid is None and has_splits:
        splits = Splits(
            Dataset(below(train, "train"), **opening), Dataset(below(train, "valid"), **opening)
        )
        _check_tokenizer(splits.train, tokenizer)
        return splits
    if valid is not None:
        train = below(train, "train") if has_splits else train
        options: _Options = {"text_field": text_field, **opening}
        opened = open_data(train, tokenizer, work / "train", note, **options)
        # Text that goes with a prepared data set is tokenized as that was.
        own = opened.tokenizer
        return Splits(opened, open_data(as_place(valid), own, work / "valid", note, **options))
    if is_url(train) or is_prepared(train):
        # Its own error first, if it is no data set at all.
        Dataset(train, verify=False, cache_size=cache_size)
        raise ConfigError(
            "valid", None, f"a path: {train} holds no train/ and valid/ to choose from"
        )
    assert isinstance(train, Path), "no URL"
    if not (work / "train").is_dir():  # otherwise the text itself may be gone
        _check_exists(train)
        note(f"tokenizing {_named(train)}, {HELD_OUT:.0%} of it held out for validation")
        loaded = load_tokenizer(tokenizer)
        made = prepare([train], loaded, work, text_field=text_field, valid_fraction=HELD_OUT)
        _note_skipped(made[0], note)
    return Splits(Dataset(work / "train", verify=verify), Dataset(work / "valid", verify=verify))


def as_place(source: Place) -> Place:
    """A path, unless it is a URL."""
    return source if is_url(source) else Path(source)


def below(place: Place, name: str) -> Place:
    """A directory in another."""
    return f"{str(place).rstrip('/')}/{name}" if is_url(place) else Path(place) / name


def is_prepared(place: Place) -> bool:
    """Return whether a directory holds a manifest.

    Raises:
        StorageError: the storage behind a URL refuses to say so.
    """
    if is_url(place):
        return Remote(str(place), "data").read(MANIFEST) is not None
    return (Path(place) / MANIFEST).exists()


def _holds_data(path: Path) -> bool:
    return any(map(is_prepared, (path, path / "train", path / "valid")))


def _has_splits(place: Place) -> bool:
    return all(is_prepared(below(place, split)) for split in ("train", "valid"))


def _named(path: Path) -> str:
    return "standard input" if str(path) == STDIN else str(path)


def _check_exists(path: Path) -> None:
    if str(path) != STDIN and not path.exists():
        raise MissingFileError(f"{path}: no such file or directory")


def _check_tokenizer(data: Dataset, tokenizer: str | Tokenizer) -> None:
    """Refuse a tokenizer that is named and is not the one that made the data."""
    if tokenizer == "default":
        return
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if loaded.sha256 != data.manifest.tokenizer_sha256:
        allowed = f"left out or the tokenizer that {data.place} was prepared with"
        raise ConfigError("tokenizer", loaded.name, allowed)


def _note_skipped(manifest: Manifest, note: Callable[[str], None]) -> None:
    records = manifest.records
    if records is not None and records.bad:
        note(f"skipped {records.bad:,} of {records.read:,} records ({records.first_bad})")


def _from_hub(
    name: str,
    valid: str | None,
    tokenizer: str,
    work: Path,
    note: Callable[[str], None],
    verify: Verify,
) -> Splits:
    """A data set of the hub; its own validation split, or the one that is named."""
    source = named(name)
    if source.train is None:
        raise ConfigError("data", PREFIX + name, "a data set with a training split")
    held_out = source if valid is None else named(valid.removeprefix(PREFIX))
    split = source.valid if valid is None else held_out.valid or held_out.train
    if split is None:
        raise ConfigError(
            "valid", valid, "hub:PATH[:CONFIG]@SPLIT: this data set has no validation split"
        )
    loaded = load_tokenizer(tokenizer)
    for target, kind, part in (("train", source, source.train), ("valid", held_out, split)):
        if not (work / target).is_dir():
            note(f"preparing {kind.name(part)}")
            prepare_split(kind, part, loaded, work / target)
    return Splits(Dataset(work / "train", verify=verify), Dataset(work / "valid", verify=verify))


def open_data(
    path: Place,
    tokenizer: str | Tokenizer,
    work: Path,
    note: Callable[[str], None],
    *,
    text_field: str = "text",
    lines: bool = False,
    detokenizer: str | None = None,
    eos: bool = True,
    verify: Verify = "auto",
    cache_size: int | str = CACHE_SIZE,
) -> Dataset:
    """Open a prepared directory, or tokenize text or a hub data set into ``work``.

    The directory may be at a URL.

    ``text_field``, ``lines``, ``detokenizer`` and ``eos`` are those of
    :func:`bd3lm.data.prepare`, for text. A data set of the hub has its own detokenizer unless one
    is named.

    Raises:
        MissingFileError: the path does not exist.
        NotADatasetError: a directory that is not a prepared data set.
        ConfigError: the tokenizer that is named is not that of the prepared data.
    """
    source = named(str(path).removeprefix(PREFIX)) if str(path).startswith(PREFIX) else None
    if source is not None and detokenizer is not None:
        source = replace(source, detokenizer=detokenizer)
    if source is None and (is_url(path) or _holds_data(Path(path))):
        opened = Dataset(path, verify=verify, cache_size=cache_size)
        if isinstance(tokenizer, str):
            _check_tokenizer(opened, tokenizer)
        return opened
    if work.is_dir():
        return Dataset(work, verify=verify)
    path = Path(path)
    if source is None:
        _check_exists(path)
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if source is None:
        note(f"tokenizing {_named(path)}")
        made = prepare(
            [path],
            loaded,
            work,
            text_field=text_field,
            lines=lines,
            detokenizer=detokenizer,
            eos=eos,
        )
        _note_skipped(made[0], note)
    else:
        split = source.valid or source.train
        assert split is not None, "every data set has one"
        note(f"preparing {source.name(split)}")
        prepare_split(source, split, loaded, work, eos=eos)
    return Dataset(work, verify=verify)


def _default(tokenizer: str, work: Path, note: Callable[[str], None], verify: Verify) -> Splits:
    missing = [split for split in ("train", "valid") if not (work / split).is_dir()]
    if missing:
        note("tokenizing the English text shipped with the package")
        loaded = load_tokenizer(tokenizer)
        with as_file(files("bd3lm") / "assets" / "default_corpus.jsonl.xz") as corpus:
            for split in missing:
                prepare([corpus], loaded, work / split, where=("split", split))
    return Splits(Dataset(work / "train", verify=verify), Dataset(work / "valid", verify=verify))
