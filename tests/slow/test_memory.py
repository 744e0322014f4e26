"""Peak memory of preparing data sets, each in a process of its own.

Measured (Linux, two threads): 50 MB in one document take about 130 MB above the imports, most of
it the text and its copies; 400,000 documents of 100 bytes take about 90 MB. The bounds leave room
for other allocators, and both are far below the size of everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm.data import Dataset

pytestmark = pytest.mark.slow

PREPARE = """
import json, sys, time
from bd3lm.data import load_tokenizer, prepare
def peak():  # not getrusage's, which a child inherits from the process that started it
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
tokenizer = load_tokenizer(sys.argv[3])
before, start = peak(), time.perf_counter()
lines = sys.argv[4] == "lines"
(manifest,) = prepare([sys.argv[1]], tokenizer, sys.argv[2], lines=lines, threads=2)
seconds = time.perf_counter() - start
print(json.dumps([before, peak(), seconds, manifest.num_tokens, manifest.num_documents]))
"""
MB = 1 << 20


def prepared(
    text: Path, out: Path, tokenizer: Path | str = "default", lines: bool = False
) -> tuple[float, int, int]:
    """MB above the imports' own, tokens, documents."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, text, out, tokenizer, "lines" if lines else "whole"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    before, after, seconds, tokens, documents = json.loads(done.stdout)
    print(
        f"{text.name}: {tokens:,} tokens of {documents:,} documents in {seconds:.1f} s "
        f"({tokens / seconds:,.0f} tokens/s); peak {after / MB:.0f} MB, "
        f"{(after - before) / MB:.0f} MB above the imports"
    )
    return (after - before) / MB, tokens, documents


def test_one_document_of_50_mb(tmp_path: Path) -> None:
    with (tmp_path / "one.txt").open("w") as file:
        for i in range(1_100_000):
            file.write(f"The old house number {i:7} stood by the river.\n")
    assert (tmp_path / "one.txt").stat().st_size > 50_000_000
    above, tokens, documents = prepared(tmp_path / "one.txt", tmp_path / "set")
    assert documents == 1
    assert tokens > 10_000_000
    assert above < 300


def test_400_000_documents_of_100_bytes(tmp_path: Path) -> None:
    with (tmp_path / "many.txt").open("w") as file:
        for i in range(400_000):
            line = f"{i} the old house stood by the river, and nobody had lived there for years"
            file.write(line.ljust(99, ".") + "\n")
    above, _, documents = prepared(tmp_path / "many.txt", tmp_path / "set", lines=True)
    assert documents == 400_000
    assert above < 200
    assert Dataset(tmp_path / "set").num_documents == 400_000


@pytest.mark.parametrize("name", ["gpt2_vocab.bpe", "bert_base_uncased_vocab.txt"])
def test_a_hundred_megabytes_of_books(shared_data: Path, name: str, tmp_path: Path) -> None:
    above, tokens, documents = prepared(
        shared_data / "books_train_100MB.jsonl.xz",
        tmp_path / "set",
        shared_data / "tokenizers" / name,
    )
    assert documents == 208
    assert tokens > 20_000_000
    assert above < 250
