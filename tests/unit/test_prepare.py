"""Text files to data sets: every kind the same, and nothing half-made after any failure."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bd3lm.data import Dataset, Tokenizer, prepare, read_documents
from bd3lm.errors import (
    ConfigError,
    DiskFullError,
    EmptyCorpusError,
    ExistsError,
    FormatError,
    MissingFileError,
    StorageError,
)
from tests.conftest import TEXTS

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def documents(folder: Path) -> list[list[int]]:
    data = Dataset(folder)
    return [data.document(i).tolist() for i in range(data.num_documents)]


def ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def left_behind(folder: Path, *expected: str) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_kind_is_the_same(
    suffix: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    packed = tmp_path / f"packed.jsonl{suffix}"
    packed.write_bytes(COMPRESS[suffix](corpus.read_bytes()))
    assert read_documents(packed) == TEXTS
    prepare([packed], tokenizer, tmp_path / "jsonl")
    assert documents(tmp_path / "jsonl") == ids(tokenizer, TEXTS)
    text = tmp_path / f"packed.txt{suffix}"
    text.write_bytes(COMPRESS[suffix]("\n\n".join(TEXTS).encode()))
    prepare([text], tokenizer, tmp_path / "whole")
    assert documents(tmp_path / "whole") == ids(tokenizer, ["\n\n".join(TEXTS)])
    lines = [line for text in TEXTS for line in text.replace("\r\n", "\n").split("\n") if line]
    prepare([text], tokenizer, tmp_path / "lines", lines=True)
    assert documents(tmp_path / "lines") == ids(tokenizer, lines)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "lz4"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet(codec: str, kind: pa.DataType, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = pa.array([text.encode() for text in TEXTS]).cast(kind)
    table = pa.table({"body": texts, "lang": ["a", "b", "a", "b", "a"], "n": range(5)})
    pq.write_table(table, tmp_path / "x.parquet", compression=codec, row_group_size=2)
    prepare([tmp_path / "x.parquet"], tokenizer, tmp_path / "set", text_field="body")
    assert documents(tmp_path / "set") == ids(tokenizer, TEXTS)
    assert (
        read_documents(tmp_path / "x.parquet", text_field="body", where=("lang", "b"))
        == TEXTS[1::2]
    )


def test_several_files_and_where(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("and more")
    (manifest,) = prepare([tmp_path / "more.txt", corpus], tokenizer, tmp_path / "both")
    assert documents(tmp_path / "both") == ids(tokenizer, ["and more", *TEXTS])
    assert manifest.source == [str(tmp_path / "more.txt"), str(corpus)]
    prepare([corpus], tokenizer, tmp_path / "odd", where=("number", "1"))
    assert documents(tmp_path / "odd") == ids(tokenizer, TEXTS[1::2])


def test_empty_documents_are_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = ['{"text": ""}', "", '{"text": "a"}', "  ", '{"text": ""}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    prepare([tmp_path / "x.jsonl"], tokenizer, tmp_path / "set")
    assert documents(tmp_path / "set") == ids(tokenizer, ["a"])


def test_the_held_out_share(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(2000)]
    path = tmp_path / "x.txt"
    path.write_text("\n".join(texts))
    made = prepare([path], tokenizer, tmp_path / "set", lines=True, valid_fraction=0.1)
    train, valid = (documents(tmp_path / "set" / split) for split in ("train", "valid"))
    assert [m.num_documents for m in made] == [len(train), len(valid)]
    assert sorted(train + valid) == sorted(ids(tokenizer, texts)), "disjoint and complete"
    assert 150 < len(valid) < 250
    prepare([path], tokenizer, tmp_path / "again", lines=True, valid_fraction=0.1)
    assert documents(tmp_path / "again" / "valid") == valid


def test_a_share_outside_of_its_range(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one document")
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"valid-fraction = .*: must be above 0 and below 1"):
            prepare([tmp_path / "x.txt"], tokenizer, tmp_path / "set", valid_fraction=fraction)
    for threads in (0, -1, 1025):
        with pytest.raises(ConfigError, match=rf"threads = {threads}: must be 1 to 1024"):
            prepare([tmp_path / "x.txt"], tokenizer, tmp_path / "set", threads=threads)


@pytest.mark.parametrize("split", [None, 0.5])
@pytest.mark.parametrize("beforehand", ["nothing", "empty", "nested"])
def test_stopping_leaves_nothing(
    split: float | None, beforehand: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    if beforehand == "empty":
        out.mkdir()
    if beforehand == "nested":
        out = tmp_path / "a" / "b" / "set"
    calls = []

    def stop(*progress: int) -> None:
        calls.append(progress)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tokenizer, out, valid_fraction=split, progress=stop)
    left_behind(tmp_path, corpus.name, *(["set"] if beforehand == "empty" else []))
    assert beforehand != "empty" or not any(out.iterdir())
    assert calls[0][0] <= calls[0][1] == corpus.stat().st_size


def test_progress_ends_at_the_whole(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    calls = []
    (manifest,) = prepare(
        [corpus], tokenizer, tmp_path / "set", progress=lambda *x: calls.append(x)
    )
    size = corpus.stat().st_size
    assert calls[-1] == (size, size, manifest.num_tokens)


BAD = [
    ("gone.txt", None, MissingFileError, r"gone\.txt: no such file"),
    ("x.csv", b"a,b", FormatError, r"x\.csv: this kind of file is not read; it must be \.txt"),
    ("x.jsonl", b'{"text"\n', FormatError, r"x\.jsonl, record 1: not valid JSON"),
    ("x.jsonl", b'["a"]\n', FormatError, "record 1: not a JSON object"),
    ("x.jsonl", b'{"body": "a"}\n', FormatError, "record 1: it has no field text, only body"),
    ("x.jsonl", b'{"text": 3}\n', FormatError, "record 1: its field text is not a string"),
    ("x.txt", b"ab\xffc", FormatError, r"x\.txt, record 1: not valid UTF-8 \(byte 2"),
    ("x.txt", b"", EmptyCorpusError, r"no text was found in .*x\.txt: an empty corpus"),
    ("x.txt.gz", b"plain", FormatError, r"x\.txt\.gz: cannot be decompressed"),
    ("x.txt.xz", lzma.compress(b"a" * 9999)[:-20], FormatError, "truncated or damaged"),
    ("x.txt.zst", b"plain", FormatError, r"x\.txt\.zst: cannot be decompressed"),
    ("x.txt.bz2", bz2.compress(b"a"), FormatError, "this kind of file is not read"),
    ("x.parquet", b"PAR1", FormatError, "not a readable parquet file"),
]


@pytest.mark.parametrize(("name", "content", "error", "message"), BAD)
def test_bad_input(
    name: str,
    content: bytes | None,
    error: type[Exception],
    message: str,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        prepare([tmp_path / name], tokenizer, tmp_path / "set")
    assert "\n" not in str(raised.value)
    left_behind(tmp_path, *([] if content is None else [name]))


def test_parquet_without_the_column(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(FormatError, match="it has no column text, only body, n"):
        prepare([tmp_path / "x.parquet"], tokenizer, tmp_path / "set")
    with pytest.raises(FormatError, match="record 1: its field n is not a string"):
        prepare([tmp_path / "x.parquet"], tokenizer, tmp_path / "set", text_field="n")
    left_behind(tmp_path, "x.parquet")


def test_an_occupied_output(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    prepare([corpus], tokenizer, out)  # an empty directory is as good as none
    before = documents(out)
    for target in (out, corpus):
        with pytest.raises(ExistsError, match="already exists; choose another output"):
            prepare([corpus], tokenizer, target)
    assert documents(out) == before


def large(folder: Path, kilobytes: int) -> Path:
    path = folder / "large.txt"
    path.write_text("The old house stood by the river. " * (30 * kilobytes))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        subprocess.run(mounted, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root and a system that allows it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(tokenizer: Tokenizer, small_disk: Path, tmp_path: Path) -> None:
    text = large(tmp_path, 1000)
    with pytest.raises(DiskFullError, match="no space left on the device; nothing was kept"):
        prepare([text], tokenizer, small_disk / "set")
    left_behind(small_disk)


def test_a_write_that_fails(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = large(tmp_path, 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"tokens\.bin: File too large"):
            prepare([text], tokenizer, tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left_behind(tmp_path, text.name)


def command(*arguments: object) -> list[str]:
    # Started in the background of a shell, these tests would hand on a SIGINT that is ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from bd3lm.cli.prepare import main; main()"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_the_command(corpus: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(corpus, "--out", tmp_path / "set", "--where", "number=0"),
        capture_output=True,
        text=True,
        check=True,
    )
    data = Dataset(tmp_path / "set")
    assert f"3 documents, {data.num_tokens:,} tokens (uint16)" in done.stdout
    assert f"BOS {data.manifest.bos_id}" in done.stdout
    assert not done.stderr


@contextmanager
def endless(path: Path) -> Iterator[None]:
    """A pipe with more text than will ever be read: what reads it is still at it when stopped."""
    os.mkfifo(path)

    def write() -> None:
        with suppress(BrokenPipeError), path.open("w") as pipe:
            for number in itertools.count():
                pipe.write(f"house number {number} by the river\n")

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield
    finally:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # lets a writer go that nobody read
        writer.join(timeout=60)
        path.unlink()
    assert not writer.is_alive()


def wait_for_text(running: subprocess.Popen[str], written: Path) -> None:
    """Until some of the output is on the disk."""
    until = time.monotonic() + 60
    while not (written.exists() and written.stat().st_size):
        assert running.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < until
        time.sleep(0.005)


def test_the_command_is_interrupted(tmp_path: Path) -> None:
    text = tmp_path / "many.txt"
    with endless(text):
        running = subprocess.Popen(
            command(text, "--lines", "--out", tmp_path / "set"), stderr=subprocess.PIPE, text=True
        )
        wait_for_text(running, tmp_path / ".set.partial" / "tokens.bin")
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors == "stopped; nothing half-written was kept\n"
    left_behind(tmp_path)


@pytest.mark.parametrize("split", [None, 0.5])
def test_the_command_is_killed_and_started_again(split: float | None, tmp_path: Path) -> None:
    text = tmp_path / "many.txt"
    options = ["--lines"] if split is None else ["--lines", "--valid-fraction", split]
    again = command(text, "--out", tmp_path / "set", *options)
    partial = tmp_path / ".set.partial"
    with endless(text):
        running = subprocess.Popen(again, text=True)
        wait_for_text(running, partial / ("tokens.bin" if split is None else "train/tokens.bin"))
        running.kill()
        running.wait(timeout=60)
    assert not (tmp_path / "set").exists(), "nothing half-made has the name of what is whole"
    assert partial.exists()
    text.write_text("".join(f"house number {i} by the river\n" for i in range(2000)))
    subprocess.run(again, check=True, capture_output=True)
    left_behind(tmp_path, text.name, "set")
    for made in ["set"] if split is None else ["set/train", "set/valid"]:
        assert Dataset(tmp_path / made).num_tokens > 0
    refused = subprocess.run(again, check=False, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "already exists; choose another output or remove it first" in refused.stderr


REFUSED = {
    "missing": (["gone.txt"], "gone.txt: no such file or directory"),
    "empty": (["empty.txt"], "an empty corpus cannot be used"),
    "json": (["bad.jsonl"], "bad.jsonl, record 1: not valid JSON"),
    "kind": (["x.csv"], "x.csv: this kind of file is not read"),
    "exists": (["corpus.jsonl", "--out", "full"], "full already exists"),
    "tokenizer": (["corpus.jsonl", "--tokenizer", "./none"], "tokenizer ./none: no such file"),
    "where": (["corpus.jsonl", "--where", "split"], "where = split: must be FIELD=VALUE"),
    "nothing": (["corpus.jsonl", "--where", "number=7"], "none of the 5 records has number = 7"),
    "size": (["corpus.jsonl", "--tokenizer", "train:9"], "vocab-size = 9: must be 258 (all"),
}

IN_TURN = """
import json, os, sys, contextlib, io
from bd3lm.cli.prepare import main
for arguments in json.loads(sys.argv[1]):
    errors = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(errors):
        try:
            main(arguments)
        except SystemExit as exit:
            code = exit.code
    print("RESULT", json.dumps([code, errors.getvalue(), sorted(os.listdir("."))]))
main(arguments)
"""


def test_the_command_refuses(corpus: Path, tmp_path: Path) -> None:
    """One interpreter for all cases: starting one takes seconds."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(os.listdir(tmp_path))
    cases = [
        arguments if "--out" in arguments else [*arguments, "--out", "set"]
        for arguments, _ in REFUSED.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(cases)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2, "of the last case, which nothing catches"
    results = [
        json.loads(line.removeprefix("RESULT "))
        for line in done.stdout.splitlines()
        if line.startswith("RESULT")
    ]
    for (code, errors, files), (_, sentence) in zip(results, REFUSED.values(), strict=True):
        assert code == 2
        assert errors.startswith("error: ")
        assert sentence in errors
        assert errors.count("\n") == 1
        assert errors.endswith("\n")
        assert files == before
    assert done.stderr == results[-1][1]
