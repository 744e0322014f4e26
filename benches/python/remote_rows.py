"""Shuffled rows of a data set in object storage: what do they cost?

A data set is read through a file system that answers every request after a fixed time and serves a
fixed number at once, as object storage does. Batches are made as a run makes them, with the rows of
the next steps fetched ahead: with a cache that holds a part of the tokens, and with one that holds
all. The same batches of the local directory are compared with them, bit for bit.

Run: python benches/python/remote_rows.py [--megabytes N] [--milliseconds N] [--connections N]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import torch
from common import RESULTS, write
from fsspec.asyn import AsyncFileSystem

from bd3lm.config import NoiseConfig
from bd3lm.data import Batch, Dataset, Loader, Prefetcher, Rows, load_tokenizer, prepare_texts
from bd3lm.systems.sized_noise import SizedNoise

LENGTHS, BATCH_SIZE = (128, 1024), 128


class SlowStorage(AsyncFileSystem):
    """Files of a directory, each request after ``seconds``, ``connections`` at a time."""

    protocol = "slow"
    seconds = 0.0
    connections = 1
    _room: asyncio.Semaphore | None = None

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        if self._room is None:
            self._room = asyncio.Semaphore(self.connections)
        async with self._room:
            await asyncio.sleep(self.seconds)
        with open(self._strip_protocol(path), "rb") as file:
            file.seek(start or 0)
            return file.read(-1 if end is None else end - (start or 0))

    async def _get_file(self, path: str, local: str, **options: Any) -> None:
        Path(local).write_bytes(await self._cat_file(path))

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        size = os.stat(self._strip_protocol(path)).st_size
        return {"name": path, "size": size, "type": "file"}


def batches(data: Dataset, seq_len: int, steps: int, first: int = 0) -> tuple[float, list[Batch]]:
    """Seconds of the batches of steps, and the batches."""
    rows = Rows(data, seq_len=seq_len, block_size=16)
    noise = SizedNoise(16, NoiseConfig(), time_conditioned=False).spec
    prefetcher = Prefetcher(Loader(rows, BATCH_SIZE, seed=1), first + steps)
    begun = time.perf_counter()
    made = [prefetcher.get(step, lambda _: noise)[0] for step in range(first, first + steps)]
    seconds = time.perf_counter() - begun
    prefetcher.close()
    return seconds, made


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are equal in all that a model sees."""
    names = ("x0", "xt", "masked", "weight", "mask_prob", "noisable")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def data_set(folder: Path, size: int) -> None:
    """Prepare ``size`` bytes of random words."""
    tokenizer = load_tokenizer("default")
    draw = torch.Generator().manual_seed(1)
    count = size // 2 // 1024
    ids = torch.randint(256, tokenizer.vocab_size, (1024,), generator=draw).tolist()
    text = tokenizer.decode(ids)
    prepare_texts((f"{number} {text}" for number in range(count)), tokenizer, folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=64.0)
    parser.add_argument("--milliseconds", type=float, default=30.0)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "remote_rows.json")
    args = parser.parse_args()
    SlowStorage.seconds, SlowStorage.connections = args.milliseconds / 1e3, args.connections
    fsspec.register_implementation("slow", SlowStorage)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"
        data_set(Path(work) / "set", int(args.megabytes * 1e6))
        local = Dataset(Path(work) / "set")
        size = 2 * local.num_tokens
        for seq_len in LENGTHS:
            took, expected = batches(local, seq_len, args.steps)
            rows = BATCH_SIZE * args.steps
            found.append({"way": "local", "seq_len": seq_len, "rows_per_second": rows / took})
            for way, cache in (
                ("a quarter", size // 4),
                ("all", size * 2),
            ):
                remote = Dataset(f"slow://{work}/set", cache_size=cache)
                reader = remote.remote
                assert reader is not None
                for again in ("", ", again"):
                    before = reader.requests, reader.bytes
                    took, made = batches(remote, seq_len, args.steps)
                    assert all(map(same, made, expected))
                    found.append(
                        {
                            "way": way + again,
                            "seq_len": seq_len,
                            "rows_per_second": rows / took,
                            "requests_per_row": (reader.requests - before[0]) / rows,
                            "bytes_per_row_byte": (reader.bytes - before[1])
                            / (rows * (seq_len - 1) * 2),
                        }
                    )
            for result in found[-5:]:
                traffic = result.get("bytes_per_row_byte", 0.0)
                print(
                    f"L={seq_len}, {result['way']}: {result['rows_per_second']:,.0f} rows/s, "
                    f"{result.get('requests_per_row', 0.0):.2f} requests a row, "
                    f"{traffic:.1f} bytes read for each of a row"
                )
    settings = {"megabytes": args.megabytes, "milliseconds": args.milliseconds}
    settings |= {"connections": args.connections, "batch_size": BATCH_SIZE, "steps": args.steps}
    write(args.out, settings | {"found": found})


if __name__ == "__main__":
    main()
