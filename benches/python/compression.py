"""Bits per byte of the demo's validation text under PPMd, a strong compressor without a network.

The figure is the cost of the validation text after the training text: the compressed size of
both, less that of the training text alone, over the validation text's bytes.

Run: ``python benches/python/compression.py``; prints one JSON object.
"""

from __future__ import annotations

import json
from importlib.resources import as_file, files

from bd3lm.data import read_documents

ORDER = 8
MEMORY = 1 << 28


def main() -> None:
    try:
        import pyppmd
    except ImportError:
        print("skipped: the peer is pyppmd, which is not installed")
        return
    with as_file(files("bd3lm") / "assets" / "default_corpus.jsonl.xz") as corpus:
        train, valid = (
            "\n".join(read_documents(corpus, where=("split", split))).encode()
            for split in ("train", "valid")
        )

    def size(data: bytes) -> int:
        return len(pyppmd.compress(data, max_order=ORDER, mem_size=MEMORY))

    bits = 8 * (size(train + b"\n" + valid) - size(train)) / (len(valid) + 1)
    record = {"peer": "PPMd", "version": pyppmd.__version__, "order": ORDER, "bits_per_byte": bits}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
