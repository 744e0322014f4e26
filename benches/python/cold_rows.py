"""Shuffled rows of a data set that is not in memory: do they crawl?

The package's text, repeated to a few gigabytes in the format of a prepared data set. Its pages are
dropped from memory, then batches are drawn: shuffled and cold, in file order and cold, and shuffled
with everything in memory.

Run: python benches/python/cold_rows.py [--gigabytes N] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, seconds, spread, write

from bd3lm.data import Dataset, Rows, load_tokenizer, prepare

CORPUS = files("bd3lm") / "assets" / "default_corpus.jsonl.xz"
BATCHES, BATCH_SIZE = 40, 32
LENGTHS = (128, 1024)


def repeated(small: Path, out: Path, size: int) -> None:
    """A data set of ``size`` bytes of tokens: ``small`` over and over."""
    out.mkdir()
    tokens = np.fromfile(small / "tokens.bin", dtype=np.uint16)
    manifest = json.loads((small / "manifest.json").read_text(encoding="utf-8"))
    count = -(-size // tokens.nbytes)
    with (out / "tokens.bin").open("wb") as file:
        for _ in range(count):
            tokens.tofile(file)
        file.flush()
        os.fsync(file.fileno())  # only clean pages can be dropped
    documents = manifest["num_documents"]
    index = (small / "tokens.idx").read_bytes()
    lengths = np.tile(np.frombuffer(index, np.int32, documents, 34), count)
    starts = np.concatenate([[0], np.cumsum(lengths.astype(np.uint64))]) * 2
    parts = [index[:18], np.array([len(lengths), len(lengths) + 1], np.uint64), lengths]
    parts += [starts[:-1].astype(np.uint64), np.arange(len(lengths) + 1, dtype=np.uint64)]
    (out / "tokens.idx").write_bytes(b"".join(bytes(part) for part in parts))
    (out / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    manifest.pop("pieces")  # for data sets that are elsewhere
    for name in manifest["files"]:
        manifest["files"][name]["bytes"] = (out / name).stat().st_size
    for key in ("num_documents", "num_tokens", "num_bytes"):
        manifest[key] *= count
    text = json.dumps(manifest | {"sha256": ""}, indent=2) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (out / "manifest.json").write_text(text.replace('"sha256": ""\n', f'"sha256": "{digest}"\n'))


def forget(file: Path) -> None:
    """Drop a file's pages from memory."""
    handle = os.open(file, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "cold_rows.json")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        small, large = Path(work) / "small", Path(work) / "large"
        prepare([Path(str(CORPUS))], load_tokenizer("default"), small)
        repeated(small, large, int(args.gigabytes * 1e9))
        for seq_len in LENGTHS:
            for way in ("shuffled, cold", "in order, cold", "shuffled, in memory"):
                data = Dataset(large, verify=False)
                rows = Rows(data, seq_len=seq_len, block_size=16)
                total = BATCHES * BATCH_SIZE
                if way.startswith("in order"):
                    chosen = np.arange(total)
                else:
                    chosen = np.random.default_rng(seq_len).integers(0, len(rows), total)
                batches = np.split(chosen.astype(np.uint64), BATCHES)
                if way.endswith("cold"):
                    forget(large / "tokens.bin")
                else:
                    for batch in batches:
                        rows.batch(batch)
                took = [seconds(lambda b=b, r=rows: r.batch(b)) for b in batches]
                result = {
                    "way": way,
                    "seq_len": seq_len,
                    "rows_per_second": total / sum(took),
                    "batch_ms": spread([1e3 * x for x in took]),
                }
                found.append(result)
                speed = result["rows_per_second"]
                print(
                    f"L={seq_len}, {way}: {speed:,.0f} rows/s, {speed * seq_len / 1e6:.2f} "
                    f"Mtokens/s; a batch of {BATCH_SIZE}: {result['batch_ms']['median']:.2f} ms"
                )
                del rows, data
    write(args.out, {"gigabytes": args.gigabytes, "batch_size": BATCH_SIZE, "found": found})


if __name__ == "__main__":
    main()
