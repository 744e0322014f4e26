"""Data sets of many gigabytes that take almost no room on a disk: one token, in sparse files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from bd3lm.data import Tokenizer

CHUNK = 64 << 20


def sparse_data_set(folder: Path, tokenizer: Tokenizer, num_tokens: int, document: int) -> Path:
    """Make a data set of documents of ``document`` tokens, all of them EOS; returns its folder."""
    assert tokenizer.eos_id == 0
    assert num_tokens % document == 0
    folder.mkdir()
    count = num_tokens // document
    with (folder / "tokens.bin").open("wb") as file:
        file.truncate(2 * num_tokens)
    header = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x08"
    with (folder / "tokens.idx").open("wb") as file:
        file.write(header + np.array([count, count + 1], "<u8").tobytes())
        np.full(count, document, "<i4").tofile(file)
        np.arange(0, 2 * num_tokens, 2 * document, dtype="<u8").tofile(file)
        np.arange(count + 1, dtype="<u8").tofile(file)
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    manifest = {
        "format": "bd3lm-tokens",
        "version": 2,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "mask_id": tokenizer.mask_id,
        "num_documents": count,
        "num_tokens": num_tokens,
        "num_bytes": 0,
        "dtype": "uint16",
        "files": {
            name: record(folder / name) for name in ("tokenizer.json", "tokens.bin", "tokens.idx")
        },
        "source": [],
        "sha256": "",
    }
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def record(path: Path) -> dict[str, object]:
    """Size and digest of a file, by chunks; those of holes are computed once."""
    size, zeros = path.stat().st_size, hashlib.sha256(bytes(CHUNK)).digest()
    digests = []
    for start in range(0, max(size, 1), CHUNK):
        length = min(CHUNK, size - start)
        if path.name == "tokens.bin" and length == CHUNK:
            digests.append(zeros)
            continue
        with path.open("rb") as file:
            file.seek(start)
            digests.append(hashlib.sha256(file.read(length)).digest())
    if len(digests) == 1:
        return {"bytes": size, "sha256": digests[0].hex()}
    joined = hashlib.sha256(b"".join(digests)).hexdigest()
    return {"bytes": size, "sha256": joined, "chunk_bytes": CHUNK}
