"""Opening of the data that a user names: nothing, a prepared directory or text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, TypedDict

from bd3lm.data.hub import PREFIX, named, prepare_split
from bd3lm.data.prepare import STDIN, prepare
from bd3lm.data.store import Dataset, Manifest
from bd3lm.data.tokenizers import Tokenizer, load_tokenizer
from bd3lm.errors import ConfigError, MissingFileError

HELD_OUT = 0.05
MANIFEST = "manifest.json"

Verify = bool | Literal["auto"]
"""Time of a data set's verification; see :class:`bd3lm.data.Dataset`."""


class _Options(TypedDict):
    text_field: str
    verify: Verify


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
) -> Splits:
    """Open the data that is named, tokenizing text into ``work`` where that has not been done.

    Nothing named: the corpus shipped with the package. A directory with ``train/`` and
    ``valid/``: those. A prepared data set needs ``valid``, which may be text; a text file or a
    folder of them has a share held out.

    Args:
        data: training data, or None.
        valid: validation data, or None.
        tokenizer: name or path, for text.
        work: directory for text that has to be tokenized.
        note: called with a line on each step.
        text_field: field of JSON and parquet records that holds the text.
        verify: when the data sets are verified.

    Raises:
        MissingFileError: a path that does not exist.
        NotADatasetError: a directory that is not a prepared data set.
        ConfigError: validation data is missing and cannot be made, or the tokenizer that is named
            is not that of the prepared data.
    """
    if data is None:
        return _default(tokenizer, work, note, verify)
    if data.startswith(PREFIX):
        return _from_hub(data.removeprefix(PREFIX), valid, tokenizer, work, note, verify)
    train = Path(data)
    if valid is None and _is_prepared(train / "train") and _is_prepared(train / "valid"):
        splits = Splits(
            Dataset(train / "train", verify=verify), Dataset(train / "valid", verify=verify)
        )
        _check_tokenizer(splits.train, tokenizer)
        return splits
    if valid is not None:
        has_splits = _is_prepared(train / "train") and _is_prepared(train / "valid")
        train = train / "train" if has_splits else train
        options: _Options = {"text_field": text_field, "verify": verify}
        opened = open_data(train, tokenizer, work / "train", note, **options)
        # Text that goes with a prepared data set is tokenized as that was.
        own = opened.tokenizer
        return Splits(opened, open_data(Path(valid), own, work / "valid", note, **options))
    if _is_prepared(train):
        Dataset(train, verify=False)  # its own error first, if it is no data set at all
        raise ConfigError(
            "valid", None, f"a path: {train} holds no train/ and valid/ to choose from"
        )
    if not (work / "train").is_dir():  # otherwise the text itself may be gone
        _check_exists(train)
        note(f"tokenizing {_named(train)}, {HELD_OUT:.0%} of it held out for validation")
        loaded = load_tokenizer(tokenizer)
        made = prepare([train], loaded, work, text_field=text_field, valid_fraction=HELD_OUT)
        _note_skipped(made[0], note)
    return Splits(Dataset(work / "train", verify=verify), Dataset(work / "valid", verify=verify))


def _is_prepared(path: Path) -> bool:
    return (path / MANIFEST).exists()


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
        allowed = f"left out or the tokenizer that {data.path} was prepared with"
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
    path: Path,
    tokenizer: str | Tokenizer,
    work: Path,
    note: Callable[[str], None],
    *,
    text_field: str = "text",
    lines: bool = False,
    detokenizer: str | None = None,
    eos: bool = True,
    verify: Verify = "auto",
) -> Dataset:
    """Open a prepared directory, or tokenize text or a hub data set into ``work``.

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
    if source is None and any(map(_is_prepared, (path, path / "train", path / "valid"))):
        opened = Dataset(path, verify=verify)
        if isinstance(tokenizer, str):
            _check_tokenizer(opened, tokenizer)
        return opened
    if work.is_dir():
        return Dataset(work, verify=verify)
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
