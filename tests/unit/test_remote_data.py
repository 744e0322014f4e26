"""Data sets at a URL: the rows of a directory through a small cache, or one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from bd3lm import storage
from bd3lm.config import NoiseConfig
from bd3lm.data import Dataset, Loader, Prefetcher, Rows, Tokenizer, join, prepare_texts
from bd3lm.data.piece_cache import PieceCache
from bd3lm.data.resolve import open_data, open_splits
from bd3lm.errors import (
    ConfigError,
    CorruptError,
    MissingFileError,
    NotADatasetError,
    StorageError,
)
from bd3lm.storage import parse_bytes
from bd3lm.systems.sized_noise import SizedNoise
from tests.integration.conftest import story
from tests.unit.test_store import wide

PIECE = 512
CACHE = 16 * PIECE
"""Bytes of the smallest cache; the data below has several times as many."""


def cut_into_pieces(folder: Path, size: int | None = PIECE) -> None:
    """Give a small data set pieces of another size, or none."""
    text = (folder / "manifest.json").read_text()
    tokens = (folder / "tokens.bin").read_bytes()
    manifest = json.loads(text) | {"sha256": ""}
    if size is None:
        del manifest["pieces"]
        (folder / "digests.bin").unlink()
    else:
        parts = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        (folder / "digests.bin").write_bytes(digests)
        record = {"bytes": len(digests), "sha256": hashlib.sha256(digests).hexdigest()}
        manifest["pieces"] = {"bytes": size, "digests": record}
    text = json.dumps(manifest, indent=2)
    digest = hashlib.sha256(text.encode()).hexdigest()
    text = re.sub(r'"sha256": ""', f'"sha256": "{digest}"', text)
    (folder / "manifest.json").write_text(text)


@pytest.fixture(scope="module")
def stores(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as one data set, as two shards, and with ids of 32 bits."""
    root = tmp_path_factory.mktemp("remote")
    texts = [story(seed, 200 + 80 * (seed % 7)) for seed in range(60)]
    prepare_texts(texts, tokenizer, root / "one")
    prepare_texts(texts[:23], tokenizer, root / "joined" / "shard-00000")
    prepare_texts(texts[23:], tokenizer, root / "joined" / "shard-00001")
    prepare_texts(texts, wide(tokenizer), root / "wide")
    for folder in ("one", "wide", "joined/shard-00000", "joined/shard-00001"):
        cut_into_pieces(root / folder)
    join(root / "joined")
    return root


@pytest.fixture
def bucket(stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The data sets in a file system in memory, with an empty local cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "WAITS", (0.0,))
    memory = fsspec.filesystem("memory")
    memory.put(str(stores), "/bucket", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


def spec():
    return SizedNoise(4, NoiseConfig(), time_conditioned=False).spec


def batches(data: Dataset, packing: str = "wrap", seed: int = 3, steps: int = 12, parts: int = 2):
    """Fields of the first batches, as a run makes them, and their row plan."""
    rows = Rows(data, seq_len=64, block_size=4, packing=packing)
    prefetcher = Prefetcher(Loader(rows, 16, seed), steps, parts)
    noise = spec()
    made = [prefetcher.get(step, lambda _: noise) for step in range(steps)]
    prefetcher.close()
    return [
        (b.x0, b.xt, b.masked, b.weight, b.mask_prob, b.noisable, b.num_noisable)
        for step in made
        for b in step
    ]


def same(a, b) -> bool:
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("name", "packing"),
    [("one", "wrap"), ("joined", "wrap"), ("joined", "best_fit"), ("wide", "aligned")],
)
def test_rows_and_noise_are_those_of_the_directory(bucket, stores, name, packing):
    local = Dataset(stores / ("wide" if name == "wide" else "one"))
    size = local.num_tokens * (4 if name == "wide" else 2)
    assert size > 4 * CACHE
    for cache_size in (CACHE, "10GB"):
        remote = Dataset(f"memory://bucket/{name}", cache_size=cache_size)
        pairs = zip(batches(local, packing), batches(remote, packing), strict=True)
        assert all(same(a, b) for a, b in pairs)
        file = remote.remote._cache._file.fileno()
        assert os.fstat(file).st_size <= min(size + 2 * PIECE, parse_bytes(cache_size))
        assert remote.remote._cache.num_pinned == 0
        assert remote.num_documents == local.num_documents
        assert all(
            np.array_equal(local.document(i), remote.document(i))
            for i in range(0, local.num_documents, 7)
        )
        assert np.array_equal(local.token_counts(), remote.token_counts())
    assert remote.remote.bytes <= size, "a cache with room for all reads nothing twice"


def test_rows_that_overlap_and_one_that_is_not_full(bucket, stores):
    plans = [
        Rows(data, seq_len=64, block_size=4, stride=16, keep_last=True)
        for data in (Dataset(stores / "one"), Dataset("memory://bucket/one", cache_size=CACHE))
    ]
    last = len(plans[0]) - 1
    rows = np.array([0, 1, 2, last, last - 1, 7, 7], np.uint64)
    ours, theirs = (plan.batch(rows) for plan in plans)
    assert same(
        (ours.x0, ours.noisable, ours.doc_ids), (theirs.x0, theirs.noisable, theirs.doc_ids)
    )


def damaged(bucket, name: str, at: int) -> None:
    content = bytearray(bucket.cat_file(name))
    content[at] ^= 1
    bucket.pipe_file(name, bytes(content))


def test_a_damaged_piece_is_named_and_never_read(bucket, stores):
    at = 7 * PIECE + 40
    damaged(bucket, "/bucket/one/tokens.bin", at)
    for cache_size in (CACHE, "10GB"):
        data = Dataset("memory://bucket/one", cache_size=cache_size)
        with pytest.raises(CorruptError) as error:
            batches(data)
        expected = "memory://bucket/one/tokens.bin: piece 7 (bytes 3584 to 4096) is not the one"
        assert str(error.value).startswith(expected)
        with pytest.raises(CorruptError):  # and again
            data.token_counts()
    rows = [Rows(d, seq_len=64, block_size=4) for d in (Dataset(stores / "one"), data)]
    whole = [row for row in range(len(rows[0])) if not 0 <= at - 126 * row < 128]
    some = np.array(whole[-20:], np.uint64)
    assert np.array_equal(rows[0].batch(some).x0, rows[1].batch(some).x0)


def test_a_request_that_fails_once_is_repeated(bucket, monkeypatch, stores):
    kind, read, calls = type(bucket), type(bucket).cat_file, []

    def sometimes(self, path, start=None, end=None, **options):
        calls.append(path)
        if start is not None and len(calls) % 3 == 0:
            raise OSError("the network is gone")
        if start is not None and len(calls) % 3 == 1:
            return read(self, path, start, end, **options)[:-1]  # and this one ended early
        return read(self, path, start, end, **options)

    data, local = Dataset("memory://bucket/one", cache_size=CACHE), Dataset(stores / "one")
    monkeypatch.setattr(storage, "WAITS", (0.0,) * 8)
    monkeypatch.setattr(kind, "cat_file", sometimes)
    monkeypatch.setattr("bd3lm.data.remote_tokens.MERGED", 1)
    row = np.array([3], np.uint64)
    found, expected = (Rows(d, seq_len=64, block_size=4).batch(row) for d in (data, local))
    assert np.array_equal(found.x0, expected.x0)


def test_storage_that_refuses_or_lost_the_file_is_one_sentence(bucket, monkeypatch):
    data = Dataset("memory://bucket/one", cache_size=CACHE)

    def refuse(self, *args, **options):
        raise OSError("503 slow down")

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "cat_file", refuse)
        with pytest.raises(StorageError, match=r"bucket/one/tokens.bin, bytes \d+ to \d+: 503"):
            batches(data)
    bucket.rm("/bucket/one/tokens.bin")
    with pytest.raises(MissingFileError, match=r"bucket/one/tokens.bin"):
        batches(data)
    with pytest.raises(NotADatasetError, match=r"memory://bucket/two holds no manifest.json"):
        Dataset("memory://bucket/two")


def test_an_index_that_was_changed_is_refused_and_a_local_copy_is_made_again(bucket, tmp_path):
    data = Dataset("memory://bucket/joined", cache_size=CACHE)
    for name in ("shard-00000/tokens.idx", "shard-00001/digests.bin", "tokenizer.json"):
        copy = data.path / name
        content = bytearray(copy.read_bytes())
        content[-1] ^= 1
        copy.write_bytes(content)
        again = Dataset("memory://bucket/joined", cache_size=CACHE)
        assert np.array_equal(again.document(30), data.document(30))
    shutil.rmtree(data.path)
    damaged(bucket, "/bucket/joined/shard-00001/tokens.idx", 60)
    with pytest.raises(CorruptError, match=r"^memory://bucket/joined/shard-00001/tokens.idx: its"):
        Dataset("memory://bucket/joined")


def test_a_data_set_without_digests_of_its_pieces_is_refused(bucket, stores, tmp_path):
    shutil.copytree(stores / "one", tmp_path / "old")
    cut_into_pieces(tmp_path / "old", None)
    assert Dataset(tmp_path / "old", verify=True).num_documents == 60
    bucket.put(str(tmp_path / "old"), "/bucket/old", recursive=True)
    with pytest.raises(NotADatasetError, match="prepare the data set again, or copy it to a disk"):
        Dataset("memory://bucket/old")


def test_only_readers_in_order_fetch_what_follows(bucket, monkeypatch, stores):
    monkeypatch.setattr("bd3lm.data.remote_tokens.SEQUENTIAL", 4)
    data = Dataset("memory://bucket/one", cache_size=64 * PIECE)
    rows, reader = Rows(data, seq_len=64, block_size=4), data.remote
    for row in np.random.default_rng(1).permutation(len(rows))[:40]:
        rows.batch(np.array([row], np.uint64))
    assert reader.bytes <= 2 * 40 * PIECE
    data = Dataset("memory://bucket/one", cache_size=64 * PIECE)
    for index in range(data.num_documents):
        data.document(index)
    assert data.remote.requests <= data.num_tokens * 2 // (4 * PIECE) + 2


def test_sizes_of_caches(bucket):
    sizes = ("65536", 65536, "10GB", "1.5 MB", "512MiB", "2t", "7B")
    found = [65536, 65536, 10**10, 1500000, 512 << 20, 2 * 10**12, 7]
    assert [parse_bytes(size) for size in sizes] == found
    for size in ("", "GB", "-1", "10XB", "1e9"):
        with pytest.raises(ConfigError, match=r"cache-size = .*: must be a number of bytes"):
            parse_bytes(size)
    with pytest.raises(ConfigError, match="cache-size = 8000: must be at least 8,192 bytes"):
        Dataset("memory://bucket/one", cache_size=8000)


def test_what_is_named_is_opened(bucket, stores, tmp_path):
    bucket.put(str(stores / "one"), "/bucket/both/train", recursive=True)
    bucket.put(str(stores / "joined"), "/bucket/both/valid", recursive=True)
    url, work = "memory://bucket/both", tmp_path / "work"
    splits = open_splits(url, None, "default", work, print, cache_size=CACHE)
    assert (splits.train.place, splits.valid.place) == (f"{url}/train", f"{url}/valid")
    splits = open_splits(url, str(stores / "one"), "default", work, print)
    assert (splits.train.place, splits.valid.place) == (f"{url}/train", str(stores / "one"))
    data = open_data("memory://bucket/one", "default", work, print)
    assert data.remote is not None
    with pytest.raises(ConfigError, match=r"valid .* holds no train/ and valid/"):
        open_splits("memory://bucket/one", None, "default", work, print)


def test_a_slot_is_never_read_as_another_piece(tmp_path):
    """Threads read through a cache of few slots, while requests fail."""
    size, pieces, slots = 16, 60, 10
    draw = random.Random(1)

    def content(piece: int) -> bytes:
        return piece.to_bytes(2, "big") * (size // 2)

    def fetch(numbers):
        if draw.random() < 0.3:
            raise StorageError("no")
        return [content(int(number)) for number in numbers]

    cache = PieceCache(pieces, size, slots, tmp_path, fetch)
    wrong, failures = [], []

    def work(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(150):
            wanted = np.array(sorted(own.sample(range(pieces), own.randint(1, 4))))
            held = cache.pin(wanted)
            try:
                cache.fill(wanted, held)
                for piece, slot in zip(wanted.tolist(), held.tolist(), strict=True):
                    out = bytearray(size)
                    cache.read(slot, 0, memoryview(out))
                    if out != content(piece):
                        wrong.append(piece)
            except StorageError:
                failures.append(seed)
            finally:
                cache.unpin(held)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert failures
    assert cache.num_pinned == 0
    assert os.fstat(cache._file.fileno()).st_size == slots * size
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_a_slot_that_was_not_filled_is_not_read(tmp_path):
    cache = PieceCache(4, 8, 2, tmp_path, lambda _: pytest.fail("nothing is fetched"))
    slot = int(cache.pin(np.array([1]))[0])
    with pytest.raises(AssertionError):
        cache.read(slot, 0, memoryview(bytearray(8)))
    assert cache.pin(np.array([2, 3]), wait=False) is None
