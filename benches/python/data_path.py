"""The data path against other libraries: interleaved runs of ours and the peer, ratio by ratio.

Peers, each skipped with a sentence where it is not installed:
  * text: Hugging Face ``datasets`` and ``tokenizers``, mapped and grouped as language-model scripts
    do, against text to a verified data set with its rows;
  * packing: the grouping alone, over lists of ids;
  * masks: one uniform number a token in PyTorch, compared with the level of its block; clipped,
    drawn again until every block is inside;
  * batches: PyTorch's DataLoader over a ``datasets`` table in torch format.

``BD3LM_PEER`` may name a folder with the original implementation; its masks and its grouping are
then peers as well. ``BD3LM_TEST_DATA`` may name one whose ``data`` holds 100 MB of books,
government pages and the vocabularies of GPT-2 and BERT; without it the shipped corpus and
tokenizer serve.

    python benches/python/data_path.py
    python benches/python/data_path.py --rows text --tokenizers BERT

What ``--out`` holds of the same machine and day is kept unless it is measured again. On a hundred
megabytes the peer takes two minutes for each tokenizer, everything else takes three.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import original
import torch
from common import RESULTS, machine, write
from timing import HEADER, Result, compare, skip
from torch import Tensor

from bd3lm.data import (
    Dataset,
    Loader,
    NoiseSpec,
    Rows,
    Schedule,
    draw_noise,
    load_tokenizer,
    prepare,
    read_documents,
)
from bd3lm.data.store import TokenArrays

Clip = tuple[float, float] | None
Row = dict[str, Any]

# Masks


def peer_masks(levels: Tensor, block_size: int, clip: Clip) -> Tensor:
    """A uniform number a token; with a clip, again for the blocks that fall outside."""
    rows, blocks = levels.shape
    p = levels.repeat_interleave(block_size, dim=1)
    mask = torch.rand(rows, blocks * block_size) <= p
    if clip is None:
        return mask
    low, high = clip
    while True:
        share = mask.view(rows, blocks, block_size).float().mean(-1)
        outside = (share < low) | (share > high)
        if not outside.any():
            return mask
        again = torch.rand(rows, blocks * block_size) <= p
        mask = torch.where(outside.repeat_interleave(block_size, dim=1), again, mask)


def peer_noise(rows: int, seq_len: int, block_size: int, clip: Clip) -> Tensor:
    """Stratified levels, then masks."""
    blocks = seq_len // block_size
    strata = torch.arange(rows * blocks).view(rows, blocks) / (rows * blocks)
    levels = (torch.rand(rows, blocks) / (rows * blocks) + strata) % 1
    low, high = clip or (1e-3, 1.0)
    return peer_masks(levels * (high - low) + low, block_size, clip)


MASK_KINDS: dict[str, tuple[NoiseSpec, Clip]] = {
    "unclipped": (NoiseSpec(Schedule("loglinear")), None),
    "clipped [.3,.8]": (
        NoiseSpec(Schedule("loglinear"), clip=(0.3, 0.8), resample=True),
        (0.3, 0.8),
    ),
    "count": (NoiseSpec(Schedule("loglinear"), estimator="count"), None),
}
MASK_GOALS: dict[tuple[str, int], tuple[float | None, float | None]] = {
    ("unclipped", 4): (6.0, 4.0),
    ("clipped [.3,.8]", 4): (40.0, 30.0),
}


def bench_masks(repeats: int) -> Iterator[Result]:
    """Noise of rows that are already there, one thread each."""
    rows, seq_len = 512, 128
    x0 = torch.zeros(rows, seq_len, dtype=torch.int64)
    noisable = torch.ones(rows, seq_len, dtype=torch.bool)
    peers: dict[str, Callable[[int, int, int, Clip], Any]] = {"torch": peer_noise}
    if (theirs := original.masks()) is not None:
        peers["original"] = theirs
    for block_size in (4, 16):
        for kind, (spec, clip) in MASK_KINDS.items():
            step, bounds = itertools.count(), MASK_GOALS.get((kind, block_size), (None, None))

            def ours(spec: NoiseSpec = spec, s: int = block_size, step: Any = step) -> Any:
                return draw_noise(spec, x0, noisable, s, seed=1, step=next(step))

            for name, peer in peers.items():
                yield compare(
                    f"masks {kind} L=128 S={block_size}",
                    name + (", unclipped" if kind == "count" else ""),
                    x0.numel(),
                    ours,
                    lambda p=peer, s=block_size, c=clip: p(rows, seq_len, s, c),
                    repeats=repeats,
                    bounds=bounds if name == "original" else (None, None),
                )


# Packing


def group_texts(examples: dict[str, list[list[int]]], seq_len: int, bos: int, eos: int) -> Any:
    """Concatenate all documents of a batch and cut rows, each between BOS and EOS."""
    room = seq_len - 2
    joined = list(itertools.chain.from_iterable(examples["input_ids"]))
    rows = [[bos, *joined[i : i + room], eos] for i in range(0, len(joined) - room + 1, room)]
    return {"input_ids": rows, "attention_mask": [[1] * seq_len] * len(rows)}


PACKED = 1 << 15
"""Tokens of a call: rows that stay in the second cache. The peers take 1,000 documents a call."""
PACKING_GOALS = {1024: (150.0, 100.0), 128: (35.0, 30.0)}


def bench_packing(data: Dataset, repeats: int) -> Iterator[Result]:
    """Ids of documents in memory to rows in memory."""
    documents = [data.document(i).tolist() for i in range(data.num_documents)]
    m = data.manifest
    vocab, bos, eos = m.vocab_size, m.bos_id, m.eos_id
    arrays = TokenArrays(documents, vocab_size=vocab, bos_id=bos, eos_id=eos, mask_id=m.mask_id)
    peers: dict[str, Callable[..., Any]] = {"group_texts in Python": group_texts}
    if (theirs := original.group_texts()) is not None:
        peers["original"] = theirs
    for seq_len, bounds in PACKING_GOALS.items():

        def ours(seq_len: int = seq_len) -> None:
            rows = Rows(arrays, seq_len=seq_len, block_size=16, row_eos=True)
            for start in range(0, len(rows), step := PACKED // seq_len):
                stop = min(start + step, len(rows))
                rows.batch(np.arange(start, stop, dtype=np.uint64))

        def peer(group: Callable[..., Any], seq_len: int = seq_len) -> None:
            for i in range(0, len(documents), 1000):
                group({"input_ids": documents[i : i + 1000]}, seq_len, bos, eos)

        for name, group in peers.items():
            yield compare(
                f"packing L={seq_len}",
                name,
                m.num_tokens,
                ours,
                lambda group=group, peer=peer: peer(group),
                repeats=repeats,
                bounds=bounds if name == "original" else (None, None),
            )


# Text

TEXT_GOAL = (80.0, 50.0)


def bench_text(
    source: Path, kind: str, name: Path | str, seq_len: int, work: Path, repeats: int
) -> Iterator[Row]:
    """A jsonl file to a data set on disk with its rows, each text tokenized once a run."""
    if find_spec("datasets") is None:
        skip(f"text, {kind}", "the package datasets is not installed")
        return
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(name)
    inner = tokenizers.Tokenizer.from_str(tokenizer.json)
    _, bos, eos, _ = tokenizer.special
    number = itertools.count()
    made = prepare([source], tokenizer, work / "once")[0]
    size = sum((work / "once" / name).stat().st_size for name in ("tokens.bin", "tokens.idx"))
    beside = (size - 2 * made.num_tokens) / made.num_documents

    def ours() -> None:
        out = work / f"ours-{next(number)}"
        prepare([source], tokenizer, out)
        Rows(Dataset(out), seq_len=seq_len, block_size=16, row_eos=True)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = inner.encode_batch(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*e.ids, eos] for e in encoded]}

    theirs = original.group_texts()
    group = theirs or group_texts
    # The original maps with as many processes as there are cores.
    processes = os.cpu_count()

    def peer() -> None:
        cache = work / f"peer-{next(number)}"
        table = datasets.load_dataset(
            "json", data_files=str(source), split="train", cache_dir=str(cache)
        )
        table = table.select_columns(["text"])
        table = table.map(
            tokenize, batched=True, remove_columns=table.column_names, num_proc=processes
        )
        table = table.map(
            lambda batch: group(batch, seq_len, bos, eos),
            batched=True,
            remove_columns=table.column_names,
            num_proc=processes,
        )
        table.save_to_disk(str(cache / "rows"))

    peer_name = f"datasets {datasets.__version__}" + ("" if theirs is None else " + original")
    result = compare(
        f"text to rows, {kind} L={seq_len}",
        peer_name,
        made.num_tokens,
        ours,
        peer,
        repeats=repeats,
        bounds=TEXT_GOAL,
        cold=True,
    )
    last = max(work.glob("peer-*"), key=lambda folder: folder.stat().st_mtime)
    theirs = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    print(f"{'':36} disk: 2 bytes a token and {beside:.2f} a document", end="")
    print(f"; the peer's {theirs / made.num_tokens:.1f} a token")
    yield result.summary() | {
        "bytes": size,
        "bytes_a_document": beside,
        "peer_bytes_a_token": theirs / made.num_tokens,
    }


# Preparing

PREPARE = """
import json, sys, time
from bd3lm.data import load_tokenizer, prepare
tokenizer = load_tokenizer(sys.argv[2])
start = time.perf_counter()
(made,) = prepare([sys.argv[1]], tokenizer, sys.argv[3], lines=sys.argv[4] == "lines")
seconds = time.perf_counter() - start
status = open("/proc/self/status").read()  # not getrusage's, which begins at its parent's
print(json.dumps([seconds, int(status.split("VmHWM:")[1].split()[0]) * 1024, made.num_tokens]))
"""
MEMORY = (256e6, 400e6)
"""Goal and floor of the peak, in bytes, on any corpus."""


def bench_preparing(shared: Path | None, work: Path, repeats: int) -> Iterator[Row]:
    """Time and the whole process's peak memory of preparing, each in a process of its own."""
    if not Path("/proc/self/status").exists():
        skip("preparing", "there is no /proc to read peak memory from")
        return
    one, many = work / "one.txt", work / "many.txt"
    with one.open("w") as file:
        file.writelines(
            f"The old house number {i:7} stood by the river.\n" for i in range(1_100_000)
        )
    line = "the old house stood by the river, and nobody had lived there for years"
    with many.open("w") as file:
        file.writelines(f"{i} {line}".ljust(99, ".") + "\n" for i in range(400_000))
    cases: list[tuple[str, Path, Path | str]] = []
    if shared is None:
        skip("preparing 100 MB of books", NO_SHARED)
    else:
        books = shared / "books_train_100MB.jsonl.xz"
        for kind, (name, _) in vocabularies(shared).items():
            cases.append((f"100 MB of books (208 documents) as xz, {kind}", books, name))
    cases.append(("one document of 50 MB, the shipped tokenizer", one, "default"))
    cases.append(("400,000 documents of 100 bytes, the shipped tokenizer", many, "default"))
    for what, source, name in cases:
        runs = []
        for _ in range(repeats):
            shutil.rmtree(work / "out", ignore_errors=True)
            how = "lines" if source == many else "whole"
            arguments = [sys.executable, "-c", PREPARE, source, name, work / "out", how]
            runs.append(json.loads(subprocess.check_output(arguments)))
        seconds, peak = (statistics.median(run[i] for run in runs) for i in (0, 1))
        print(f"preparing {what}: {seconds:.2f} s, peak {peak / 1e6:.0f} MB", flush=True)
        yield {
            "work": what,
            "peer_name": None,
            "tokens": runs[0][2],
            "seconds": seconds,
            "seconds_min": min(run[0] for run in runs),
            "seconds_max": max(run[0] for run in runs),
            "peak": peak,
            "runs": repeats,
        }


# Batches

BATCHES = 20
"""Rows of one call."""
BATCH_GOALS = {1024: (40.0, 20.0), 128: (90.0, 50.0)}


def bench_batches(data: Dataset, repeats: int) -> Iterator[Result]:
    """Shuffled batches of rows; ours with their noise as well."""
    if find_spec("datasets") is None:
        skip("batches", "the package datasets is not installed")
        return
    import datasets

    spec = NoiseSpec(Schedule("loglinear"), estimator="count")
    for (seq_len, bounds), batch_size in zip(BATCH_GOALS.items(), (16, 128), strict=True):
        rows = Rows(data, seq_len=seq_len, block_size=16, row_eos=True)
        clean = rows.batch(np.arange(len(rows), dtype=np.uint64)).x0.numpy()
        table = datasets.Dataset.from_dict({"input_ids": clean}).with_format("torch")
        torch.manual_seed(0)
        batches = iter(_endless(torch.utils.data.DataLoader(table, batch_size, shuffle=True)))
        shuffled = np.random.default_rng(0).permutation(len(rows)).astype(np.uint64)
        order = iter(_endless(np.array_split(shuffled, len(rows) // batch_size)))
        loader, step = Loader(rows, batch_size, seed=0), itertools.count()

        def ours(rows: Rows = rows, order: Any = order) -> None:
            for _ in range(BATCHES):
                rows.batch(next(order))

        def noised(loader: Loader = loader, step: Iterator[int] = step) -> None:
            for _ in range(BATCHES):
                loader.batch(next(step), spec)

        def peer(batches: Iterator[Any] = batches) -> None:
            for _ in range(BATCHES):
                next(batches)

        # The target is for clean rows, which the peer makes.
        for work, mine, wanted in (
            ("shuffled", ours, bounds),
            ("shuffled and noised", noised, (None, None)),
        ):
            yield compare(
                f"batches, {work} L={seq_len}",
                "DataLoader over datasets",
                BATCHES * batch_size * seq_len,
                mine,
                peer,
                repeats=repeats,
                bounds=wanted,
            )


def _endless(items: Any) -> Iterator[Any]:
    while True:
        yield from items


ROWS = ("masks", "packing", "batches", "text", "preparing")
NO_SHARED = "BD3LM_TEST_DATA does not name a folder whose data holds the larger texts"


def shared_data() -> Path | None:
    """The folder with the larger texts."""
    folder = Path(os.environ.get("BD3LM_TEST_DATA", ""), "data")
    return folder if "BD3LM_TEST_DATA" in os.environ and folder.is_dir() else None


def vocabularies(shared: Path | None) -> dict[str, tuple[Path | str, int]]:
    """Tokenizers to measure with, and L of their rows."""
    if shared is None:
        return {"shipped": ("default", 1024)}
    folder = shared / "tokenizers"
    return {
        "GPT-2": (folder / "gpt2_vocab.bpe", 1024),
        "BERT": (folder / "bert_base_uncased_vocab.txt", 128),
    }


def corpus(shared: Path | None, folder: Path) -> Path:
    """A jsonl file of all texts at hand."""
    texts = [files("bd3lm") / "assets" / "default_corpus.jsonl.xz"]
    if shared is not None:
        texts = [shared / "books_train_100MB.jsonl.xz", shared / "govweb_train.jsonl.xz"]
    out = folder / "corpus.jsonl"
    with out.open("w", encoding="utf-8") as file:
        for text in itertools.chain.from_iterable(read_documents(str(path)) for path in texts):
            # Books are cut into chapters' length, as the peer maps documents in lists.
            for start in range(0, len(text), 20_000):
                piece = text[start : start + 20_000]
                file.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
    return out


def main() -> None:
    """Measure, print a table, write JSON."""
    shared = shared_data()
    tokenizers = vocabularies(shared)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizers", nargs="+", choices=tokenizers, default=[*tokenizers])
    parser.add_argument("--out", type=Path, default=RESULTS / "data_path.json")
    args = parser.parse_args()
    if shared is None:
        skip("books, GPT-2, BERT", NO_SHARED)
    torch.set_num_threads(1)
    found: list[Row] = []
    print(HEADER)
    if "masks" in args.rows:
        found += [result.summary() for result in bench_masks(args.repeats)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "preparing" in args.rows:
            found += bench_preparing(shared, folder, args.repeats)
        if set(args.rows) & {"text", "packing", "batches"}:
            source = corpus(shared, folder)
            if "text" in args.rows:
                for kind in args.tokenizers:
                    (folder / "text").mkdir()
                    case = (source, kind, *tokenizers[kind], folder / "text")
                    found += bench_text(*case, args.repeats)
                    shutil.rmtree(folder / "text")
            if set(args.rows) & {"packing", "batches"}:
                first = load_tokenizer(next(iter(tokenizers.values()))[0])
                prepare([source], first, folder / "set")
                data = Dataset(folder / "set")
                for rows, bench in (("packing", bench_packing), ("batches", bench_batches)):
                    if rows in args.rows:
                        found += [result.summary() for result in bench(data, args.repeats)]
    before = json.loads(args.out.read_text()) if args.out.exists() else {"machine": None}
    kept = before["results"]["rows"] if before["machine"] == machine() else []
    rows = {(row["work"], row["peer_name"]): row for row in (*kept, *found)}
    packages = [name for name in ("numpy", "datasets", "tokenizers") if find_spec(name)]
    versions = {name: version(name) for name in packages}
    write(args.out, {"versions": versions, "rows": list(rows.values())})


if __name__ == "__main__":
    main()
