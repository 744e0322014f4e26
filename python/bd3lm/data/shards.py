"""Data sets of several shards: made apart, by one process or many, and joined without a rewrite."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bd3lm import _core
from bd3lm.data.prepare import Progress, prepare
from bd3lm.data.store import Dataset, Manifest
from bd3lm.data.tokenizers import Tokenizer
from bd3lm.errors import ConfigError, ExistsError
from bd3lm.files import write_text

PLAN = ".shards.json"
"""Name of the file that says what an interrupted call of :func:`prepare_shards` was making."""


def shard_name(index: int) -> str:
    """Name of the directory of a shard."""
    return f"shard-{index:05}"


def join(path: Path | str, shards: Sequence[str] | None = None) -> Manifest:
    """Join data sets by a manifest, so that ``path`` opens as one data set; no token is copied.

    Args:
        path: directory that holds them.
        shards: names of their directories, in the order of their documents; None: all
            ``shard-NNNNN``, by number.

    Raises:
        ExistsError: ``path`` has a manifest already.
        ConfigError: no shards, or shards made with different tokenizers or settings.
        NotADatasetError: a directory that holds something else.
    """
    path = Path(path)
    if shards is None:
        names = re.compile(r"shard-\d{5}")
        shards = sorted(entry.name for entry in path.iterdir() if names.fullmatch(entry.name))
    return Manifest.from_json(_core.join_stores(str(path), list(shards)))


def prepare_shards(
    inputs: Sequence[Path | str],
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Manifest:
    """Tokenize text files into a data set of a shard each; an interrupted call can be repeated.

    A shard is whole or not there. Called again with the same arguments, after a kill or a full
    disk, it makes the shards that are missing and joins all; the result is the same, bit for bit.

    Args:
        inputs: files, as :func:`prepare` takes them.
        tokenizer: makes the ids.
        out: directory to make, or to complete.
        progress: as for :func:`prepare`, a file at a time.
        settings: other arguments of :func:`prepare`, but for ``valid_fraction``.

    Raises:
        ConfigError: no files; a folder; ``valid_fraction``.
        ExistsError: ``out`` is complete, or holds something else or shards of other files.
        Bd3lmError: as :func:`prepare`.
    """
    out = Path(out)
    files = [str(path) for path in inputs]
    if not files:
        raise ConfigError("inputs", files, "at least one file")
    for file in files:
        if os.path.isdir(file):
            raise ConfigError("inputs", file, "a file, where shards are made: a shard is one file")
    if settings.get("valid_fraction") is not None:
        raise ConfigError(
            "valid-fraction",
            settings["valid_fraction"],
            "None where shards are made; prepare validation data of its own",
        )
    plan = {"inputs": files, "tokenizer": tokenizer.sha256} | settings
    plan.pop("threads", None)
    _begin(out, json.loads(json.dumps(plan)))
    for index, file in enumerate(files):
        shard = out / shard_name(index)
        if not shard.exists():
            prepare([file], tokenizer, shard, progress=progress, **settings)
    if (out / "manifest.json").exists():  # all that a killed call has not done is below
        made = Dataset(out, verify=False).manifest
    else:
        made = join(out, [shard_name(index) for index in range(len(files))])
    (out / PLAN).unlink()
    return made


def prepare_texts(texts: Iterable[str], tokenizer: Tokenizer, out: Path | str) -> Manifest:
    """Tokenize documents in memory, or as a generator makes them, into a data set.

    Args:
        texts: a document each.
        tokenizer: makes the ids.
        out: directory to make; must not exist, or be empty.

    Raises:
        EmptyCorpusError: no text at all.
        Bd3lmError: as :func:`prepare`. An exception of ``texts`` is passed on; nothing is left
            behind then.
    """
    reading, writing = os.pipe()
    outcome: list[list[Manifest] | BaseException] = []
    stopped = threading.Event()

    def stop(read: int, total: int, tokens: int) -> None:
        if stopped.is_set():
            raise InterruptedError

    def work() -> None:
        try:
            file = f"/dev/fd/{reading}"
            settings: dict[str, Any] = {"format": "jsonl", "source": "texts", "progress": stop}
            outcome.append(prepare([file], tokenizer, out, **settings))
        except BaseException as error:
            outcome.append(error)
        finally:
            os.close(reading)

    thread = threading.Thread(target=work, name="bd3lm-prepare-texts")
    thread.start()
    try:
        with os.fdopen(writing, "w", encoding="utf-8") as pipe:
            for text in texts:
                pipe.write(json.dumps({"text": text}) + "\n")
    except BrokenPipeError:
        pass  # the error of the other end says why
    except BaseException:
        stopped.set()
        thread.join()
        raise
    thread.join()
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result[0]


def _begin(out: Path, plan: Mapping[str, Any]) -> None:
    """Write down what is made in ``out``, or compare it with what an interrupted call began."""
    file = out / PLAN
    if not file.exists():
        if out.exists() and not _is_empty(out):
            raise ExistsError(f"{out} already exists; choose another output or remove it first")
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(plan, indent=1) + "\n")
        return
    begun = json.loads(file.read_text(encoding="utf-8"))
    for name, value in plan.items():
        if begun.get(name) != value:
            raise ExistsError(
                f"{out} was begun with {name} = {begun.get(name)}, not {value}; repeat the same "
                "call to complete it, or choose another output"
            )


def _is_empty(out: Path) -> bool:
    """Return whether a directory holds nothing, but for a plan that was being written."""
    begun = f".{PLAN}.partial"
    return out.is_dir() and all(entry.name == begun for entry in out.iterdir())
