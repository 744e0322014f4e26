"""Data sets that are damaged, that lie, or that are opened in a forked child."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bd3lm.data import Dataset, Loader, NoiseSpec, Rows, Schedule, Tokenizer, prepare
from bd3lm.errors import CorruptError, NotADatasetError, TruncatedError
from tests.conftest import TEXTS
from tests.reliability.large import sparse_data_set

FILES = ("tokens.bin", "tokens.idx", "manifest.json", "tokenizer.json")
DAMAGE = (CorruptError, NotADatasetError, TruncatedError)


@pytest.fixture(scope="module")
def made(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    lines = (json.dumps({"text": text * 20}) for text in TEXTS * 20)
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    prepare([folder / "corpus.jsonl"], tokenizer, folder / "set")
    return folder / "set"


def check_damage(made: Path, copy: Path, name: str, damage: bytes) -> None:
    shutil.copytree(made, copy, dirs_exist_ok=True)
    (copy / name).write_bytes(damage)
    with pytest.raises(DAMAGE) as raised:
        Dataset(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "count", [10, pytest.param(150, marks=pytest.mark.slow)], ids=["short", "long"]
)
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named(name: str, count: int, made: Path, tmp_path: Path) -> None:
    draw = random.Random(name)
    content = (made / name).read_bytes()
    for _ in range(count):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        check_damage(made, tmp_path / "copy", name, bytes(damaged))


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_lengthened_file_is_named(name: str, made: Path, tmp_path: Path) -> None:
    content = (made / name).read_bytes()
    draw = random.Random(name)
    for length in (0, 1, *(draw.randrange(len(content)) for _ in range(8)), len(content) - 1):
        check_damage(made, tmp_path / "copy", name, content[:length])
    check_damage(made, tmp_path / "copy", name, content + b" \x00")


def child(work: object) -> int:
    """Exit status of a forked child; one that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()  # type: ignore[operator]
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_opens_reads_and_prepares(
    made: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = Dataset(made)  # the parent uses every path first
    rows = Rows(data, seq_len=64, block_size=4)
    size = (1 << 17) // 64 + 1  # a batch that several threads fill
    numbers = np.arange(size, dtype=np.uint64) % len(rows)
    loader = Loader(rows, size, seed=0)
    spec = NoiseSpec(Schedule("loglinear"))

    def work() -> None:
        assert Dataset(made).num_tokens == data.num_tokens
        assert rows.batch(numbers).x0.shape == (size, 64)
        assert loader.batch(0, spec).x0.shape == (size, 64)
        prepare([made.parent / "corpus.jsonl"], tokenizer, tmp_path / f"set{os.getpid()}")
        assert child_of_child() == 0

    def child_of_child() -> int:
        return child(lambda: rows.batch(numbers))

    rows.batch(numbers)
    loader.batch(0, spec)
    assert child(work) == 0


def open_and_count(path: Path) -> int:
    return int(Dataset(path).token_counts().sum())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pool_of_forked_workers(made: Path) -> None:
    tokens = Dataset(made).num_tokens
    with multiprocessing.get_context("fork").Pool(2) as pool:
        counts = pool.map_async(open_and_count, [made] * 4).get(timeout=60)
    assert counts == [tokens] * 4


@pytest.fixture
def large(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A data set of more than 64 MiB, old enough for its times to be trusted."""
    text = "the old house by the river " * 40_000
    (tmp_path / "x.jsonl").write_text((json.dumps({"text": text}) + "\n") * 160)
    prepare([tmp_path / "x.jsonl"], tokenizer, tmp_path / "set")
    time.sleep(2.1)
    return tmp_path / "set"


def bytes_read(work: Callable[[], object]) -> int:
    """Bytes that this process reads from files meanwhile; a memory map does not count."""

    def total() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["rchar"])

    before = total()
    work()
    return total() - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts of Linux")
def test_a_large_data_set_is_verified_once(large: Path) -> None:
    unread = "digests.bin"  # for data sets that are elsewhere
    size = sum(path.stat().st_size for path in large.iterdir() if path.name != unread)
    assert size > 64 << 20
    remembered = large / ".verified.json"
    assert bytes_read(lambda: Dataset(large)) > size
    assert remembered.is_file()
    assert bytes_read(lambda: Dataset(large)) < 1 << 20
    assert bytes_read(lambda: Dataset(large, verify=False)) < 1 << 20
    assert bytes_read(lambda: Dataset(large, verify=True)) > size
    # A change is found again, with its old times, too.
    path = large / "tokens.bin"
    content = bytearray(path.read_bytes())
    before = path.stat()
    content[12345] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptError, match=r"tokens\.bin is corrupt: its SHA-256"):
        Dataset(large)
    content[12345] ^= 1
    path.write_bytes(content)
    Dataset(large)
    for text in ("{", "[]", '{"manifest": "x", "files": {}}', "null"):
        remembered.write_text(text)
        Dataset(large)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts of Linux")
def test_ten_gigabytes_are_read_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Later opens read the index alone: 200 MB for ten million documents of 500 tokens."""
    path = sparse_data_set(tmp_path / "set", tokenizer, 5_000_000_000, 500)
    time.sleep(2.1)
    index = (path / "tokens.idx").stat().st_size
    assert bytes_read(lambda: Dataset(path)) > 10_000_000_000
    assert bytes_read(lambda: Dataset(path)) < index + (1 << 20)
    assert Dataset(path).document(9_999_999).tolist() == [0] * 500


@pytest.mark.slow
def test_chunks_are_verified_by_their_digests(large: Path) -> None:
    record = json.loads((large / "manifest.json").read_text())["files"]["tokens.bin"]
    assert record["chunk_bytes"] == 64 << 20
    for at in (0, (64 << 20) - 1, 64 << 20, record["bytes"] - 1):
        with (large / "tokens.bin").open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 4]))
        with pytest.raises(CorruptError, match=r"tokens\.bin is corrupt: its SHA-256"):
            Dataset(large, verify=True)
        with (large / "tokens.bin").open("r+b") as file:
            file.seek(at)
            file.write(byte)
    Dataset(large, verify=True)


def read_often(rows: Rows) -> None:
    for _ in range(65):
        rows.batch(np.zeros(1, dtype=np.uint64))


def test_a_file_that_changes_while_it_is_used(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    rows = Rows(Dataset(copy), seq_len=16, block_size=4)
    numbers = np.zeros(1, dtype=np.uint64)
    rows.batch(numbers)
    time.sleep(0.01)
    with (copy / "tokens.bin").open("r+b") as file:
        file.write(b"\x05\x00")
    with pytest.raises(CorruptError, match="it was written to while it was in use"):
        read_often(rows)
