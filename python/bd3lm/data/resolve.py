"""From what a user names (nothing, a prepared directory, text files) to opened data sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

from bd3lm.data.hub import PREFIX, named, prepare_split
from bd3lm.data.prepare import prepare
from bd3lm.data.store import Dataset
from bd3lm.data.tokenizers import Tokenizer, load_tokenizer
from bd3lm.errors import ConfigError, MissingFileError

HELD_OUT = 0.05


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
) -> Splits:
    """Open the data that is named, tokenizing text into ``work`` where that has not been done.

    Nothing named: the corpus shipped with the package. A directory with ``train/`` and
    ``valid/``: those. A prepared data set needs ``valid``; a text file without it has a share of
    its documents held out.

    Args:
        data: training data, or None.
        valid: validation data, or None.
        tokenizer: name or path, for text.
        work: directory for what has to be tokenized.
        note: called with a line on each step.
        text_field: field of jsonl and parquet records that holds the text.

    Raises:
        MissingFileError: a path that does not exist.
        NotADatasetError: a directory that is not a prepared data set.
        ConfigError: validation data is missing and cannot be made; a tokenizer that is not the
            one of a prepared data set.
    """
    if data is None:
        return _default(tokenizer, work, note)
    if data.startswith(PREFIX):
        return _from_hub(data.removeprefix(PREFIX), valid, tokenizer, work, note)
    train = Path(data)
    if not train.exists():
        raise MissingFileError(f"{train}: no such file or directory")
    has_splits = (train / "train").is_dir() and (train / "valid").is_dir()
    if valid is not None:
        folder = train / "train" if has_splits else train
        opened = open_data(folder, tokenizer, work / "train", note, text_field=text_field)
        _check_tokenizer(tokenizer, opened, folder)
        # Text that goes with a prepared data set is tokenized as that was.
        own = opened.tokenizer
        return Splits(
            opened, open_data(Path(valid), own, work / "valid", note, text_field=text_field)
        )
    if train.is_dir():
        if has_splits:
            opened = Dataset(train / "train")
            _check_tokenizer(tokenizer, opened, train)
            return Splits(opened, Dataset(train / "valid"))
        Dataset(train)  # its own error first, if it is no data set at all
        raise ConfigError(
            "valid", None, f"a path: {train} holds no train/ and valid/ to choose from"
        )
    if not (work / "train").is_dir():
        note(f"tokenizing {train}, {HELD_OUT:.0%} of its documents held out for validation")
        loaded = load_tokenizer(tokenizer)
        prepare([train], loaded, work, text_field=text_field, valid_fraction=HELD_OUT)
    return Splits(Dataset(work / "train"), Dataset(work / "valid"))


def _check_tokenizer(name: str, data: Dataset, path: Path) -> None:
    """Refuse a tokenizer that a prepared data set was not made with.

    Raises:
        ConfigError: it is named, and another one.
    """
    if name != "default" and load_tokenizer(name).sha256 != data.manifest.tokenizer_sha256:
        raise ConfigError(
            "tokenizer", name, f"left out: {path} is tokenized already, with another tokenizer"
        )


def _from_hub(
    name: str, valid: str | None, tokenizer: str, work: Path, note: Callable[[str], None]
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
            note(f"preparing {PREFIX}{kind.path}, split {part}")
            prepare_split(kind, part, loaded, work / target)
    return Splits(Dataset(work / "train"), Dataset(work / "valid"))


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
) -> Dataset:
    """Open a prepared directory, or tokenize a text file or hub data set into ``work``.

    ``text_field``, ``lines``, ``detokenizer`` and ``eos`` are those of
    :func:`bd3lm.data.prepare`, for text. A data set of the hub has its own detokenizer unless one
    is named.

    Raises:
        MissingFileError: the path does not exist.
        NotADatasetError: a directory that is not a prepared data set.
    """
    source = named(str(path).removeprefix(PREFIX)) if str(path).startswith(PREFIX) else None
    if source is not None and detokenizer is not None:
        source = replace(source, detokenizer=detokenizer)
    if source is None and not path.exists():
        raise MissingFileError(f"{path}: no such file or directory")
    if source is None and path.is_dir():
        return Dataset(path)
    if work.is_dir():
        return Dataset(work)
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    note(f"tokenizing {path}")
    if source is None:
        prepare(
            [path],
            loaded,
            work,
            text_field=text_field,
            lines=lines,
            detokenizer=detokenizer,
            eos=eos,
        )
    else:
        split = source.valid or source.train
        assert split is not None, "every data set has one"
        prepare_split(source, split, loaded, work, eos=eos)
    return Dataset(work)


def _default(tokenizer: str, work: Path, note: Callable[[str], None]) -> Splits:
    missing = [split for split in ("train", "valid") if not (work / split).is_dir()]
    if missing:
        note("tokenizing the English text shipped with the package")
        loaded = load_tokenizer(tokenizer)
        with as_file(files("bd3lm") / "assets" / "default_corpus.jsonl.xz") as corpus:
            for split in missing:
                prepare([corpus], loaded, work / split, where=("split", split))
    return Splits(Dataset(work / "train"), Dataset(work / "valid"))
