"""Token files: readable by others in their format, and never silently wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from bd3lm.data import Dataset, Tokenizer, prepare
from bd3lm.data.store import TokenArrays
from bd3lm.errors import (
    ConfigError,
    CorruptError,
    MissingFileError,
    NotADatasetError,
    TokenizerError,
    TokenOutOfRangeError,
    TruncatedError,
)
from tests.conftest import TEXTS


def read_megatron(prefix: Path) -> list[np.ndarray]:
    """The sequences of a Megatron IndexedDataset, version 1, read by its description alone."""
    index = prefix.with_suffix(".idx").read_bytes()
    magic, version, code, sequences, documents = struct.unpack_from("<9sQBQQ", index)
    assert magic == b"MMIDIDX\x00\x00"
    assert version == 1
    dtype = {
        1: np.uint8,
        2: np.int8,
        3: np.int16,
        4: np.int32,
        5: np.int64,
        6: np.float64,
        7: np.float32,
        8: np.uint16,
    }[code]
    at = struct.calcsize("<9sQBQQ")
    sizes = np.frombuffer(index, np.int32, sequences, at)
    at += sizes.nbytes
    pointers = np.frombuffer(index, np.int64, sequences, at)
    at += pointers.nbytes
    starts = np.frombuffer(index, np.int64, documents, at)
    assert at + starts.nbytes == len(index)
    assert starts[0] == 0
    assert starts[-1] == sequences, "documents end where the sequences do"
    assert np.all(np.diff(starts) == 1), "one sequence a document"
    tokens = prefix.with_suffix(".bin").read_bytes()
    return [np.frombuffer(tokens, dtype, n, p) for n, p in zip(sizes, pointers, strict=True)]


def wide(tokenizer: Tokenizer) -> Tokenizer:
    """The same, with a vocabulary that does not fit 16 bits."""
    definition = json.loads(tokenizer.json)
    for entry in definition["added_tokens"]:
        if entry["id"] == tokenizer.mask_id:
            entry["id"] = 70_000
    definition["model"]["vocab"] = {
        token: 70_000 if i == tokenizer.mask_id else i
        for token, i in definition["model"]["vocab"].items()
    }
    return Tokenizer(json.dumps(definition), "wide")


@pytest.fixture
def made(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    prepare([corpus], tokenizer, tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_another_reader_sees_the_same(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, dtype: type
) -> None:
    used = tokenizer if dtype is np.uint16 else wide(tokenizer)
    (manifest,) = prepare([corpus], used, tmp_path / "set")
    documents = read_megatron(tmp_path / "set" / "tokens")
    data = Dataset(tmp_path / "set")
    assert len(documents) == len(TEXTS) == data.num_documents == manifest.num_documents
    for i, (text, ids) in enumerate(zip(TEXTS, documents, strict=True)):
        assert ids.dtype == dtype
        assert ids.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
        assert data.document(i).tolist() == ids.tolist()
    assert manifest.dtype == np.dtype(dtype).name
    assert manifest.num_tokens == data.num_tokens == sum(map(len, documents))
    assert manifest.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert data.tokenizer.special == used.special


def test_the_manifest_describes_the_files(made: Path, tokenizer: Tokenizer) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["tokenizer.json", "tokens.bin", "tokens.idx"]
    for name, record in manifest["files"].items():
        content = (made / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    pieces = manifest["pieces"]
    tokens, digests = ((made / name).read_bytes() for name in ("tokens.bin", "digests.bin"))
    assert digests == hashlib.sha256(tokens).digest(), "one piece"
    assert pieces["bytes"] == 16384
    record = {"bytes": len(digests), "sha256": hashlib.sha256(digests).hexdigest()}
    assert pieces["digests"] == record
    others = ["manifest.json", "digests.bin"]
    assert sorted(p.name for p in made.iterdir()) == sorted([*manifest["files"], *others])
    assert manifest["tokenizer_sha256"] == tokenizer.sha256
    size = manifest["files"]["tokens.bin"]["bytes"]
    assert size == 2 * manifest["num_tokens"], "two bytes a token"
    index = manifest["files"]["tokens.idx"]["bytes"]
    assert index == 42 + 20 * manifest["num_documents"], "twenty bytes a document"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "tokenizer.json"])
def test_truncated(made: Path, name: str, verify: bool) -> None:
    content = (made / name).read_bytes()
    (made / name).write_bytes(content[:-1])
    message = rf"{name} holds {len(content) - 1} bytes where its manifest says {len(content)}"
    with pytest.raises(TruncatedError, match=message):
        Dataset(made, verify=verify)


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "tokenizer.json"])
def test_a_flipped_bit(made: Path, name: str) -> None:
    content = bytearray((made / name).read_bytes())
    content[len(content) // 2] ^= 1
    (made / name).write_bytes(content)
    with pytest.raises(CorruptError, match=rf"{name} is corrupt: its SHA-256 is not"):
        Dataset(made)


def test_a_flipped_bit_anywhere_in_the_manifest(made: Path) -> None:
    path = made / "manifest.json"
    content = path.read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises((CorruptError, NotADatasetError), match=r"manifest\.json|release"):
            Dataset(made, verify=False)
    path.write_bytes(content)
    assert Dataset(made).num_documents == len(TEXTS)


def test_a_changed_number_in_the_manifest(made: Path) -> None:
    path = made / "manifest.json"
    path.write_text(path.read_text().replace('"mask_id": ', '"mask_id": 1'))
    with pytest.raises(CorruptError, match="its SHA-256 is not the one it holds"):
        Dataset(made, verify=False)


def test_an_index_that_contradicts_itself(made: Path) -> None:
    index = made / "tokens.idx"
    content = bytearray(index.read_bytes())
    content[34] ^= 1  # length of the first document
    index.write_bytes(content)
    with pytest.raises(CorruptError, match="its lengths and positions disagree"):
        Dataset(made, verify=False)


def reseal(folder: Path, **changes: object) -> None:
    """A manifest that agrees with the files as they are, and with itself."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes | {"sha256": ""}
    for name, record in manifest["files"].items():
        content = (folder / name).read_bytes()
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(manifest, indent=2)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace('"sha256": ""', f'"sha256": "{digest}"'))


def test_ids_beyond_the_vocabulary(made: Path) -> None:
    reseal(made)
    assert Dataset(made).num_documents == len(TEXTS)
    content = bytearray((made / "tokens.bin").read_bytes())
    content[:2] = b"\xff\xff"
    (made / "tokens.bin").write_bytes(content)
    reseal(made)
    with pytest.raises(TokenOutOfRangeError, match=r"token id 65535 in .*tokens\.bin is outside"):
        Dataset(made)


@pytest.mark.parametrize("documents", [[[4, 5], [10]], [[-1]]])
def test_ids_beyond_the_vocabulary_in_memory(documents: list[list[int]]) -> None:
    with pytest.raises(TokenOutOfRangeError, match=r"token id (10|-1) in ids is outside .* 10"):
        TokenArrays(documents, vocab_size=10, bos_id=0, eos_id=1, mask_id=2)


def test_what_is_no_data_set(made: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere: no such file or directory"):
        Dataset(tmp_path / "nowhere")
    with pytest.raises(NotADatasetError, match=r"holds no manifest\.json; make one with bd3lm"):
        Dataset(tmp_path)
    with pytest.raises(NotADatasetError, match=r"corpus\.jsonl is not a prepared data set"):
        Dataset(tmp_path / "corpus.jsonl")
    reseal(made, version=9)
    with pytest.raises(NotADatasetError, match="bd3lm-tokens version 9; this release reads"):
        Dataset(made)
    (made / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(NotADatasetError, match="missing field"):
        Dataset(made)


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "tokenizer.json"])
def test_a_missing_file(made: Path, name: str) -> None:
    (made / name).unlink()
    with pytest.raises(MissingFileError, match=rf"{name}: no such file"):
        Dataset(made)


def test_a_document_that_does_not_exist(made: Path) -> None:
    with pytest.raises(ConfigError, match="document = 5: must be below the 5 documents"):
        Dataset(made).document(5)


def test_the_tokenizer_of_another_vocabulary(made: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    assert Dataset(moved).tokenizer.special == Dataset(made).tokenizer.special
    reseal(moved, mask_id=5)
    with pytest.raises(TokenizerError, match=r"its mask_id is .*, that of .*moved is 5"):
        _ = Dataset(moved).tokenizer
