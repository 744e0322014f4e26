"""The data path against what one would otherwise use: ours and the peer in turn, ratio by ratio.

Peers, each skipped with a sentence where it is not installed:
  * text: Hugging Face ``datasets`` and ``tokenizers``, mapped and grouped as language-model scripts
    do, against text to a verified data set with its rows;
  * packing: the grouping alone, over lists of ids;
  * masks: one uniform number a token in PyTorch, compared with the level of its block; clipped,
    drawn again until every block is inside;
  * batches: PyTorch's DataLoader over a ``datasets`` table in torch format.

``BD3LM_PEER`` may name a folder with the original implementation; its masks and its grouping are
then peers as well.

    python benches/python/data_path.py --rows packing masks batches
    python benches/python/data_path.py --rows text --text A.jsonl.xz B.jsonl.xz \
        --tokenizer vocab.bpe vocab.txt

Rows that ``--out`` already holds are kept unless they are measured again. The ``text`` row takes a
minute or two a run on a hundred megabytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import original
import torch
from common import machine
from timing import HEADER, Result, compare, skip
from torch import Tensor

from bd3lm.data import (
    Dataset,
    Loader,
    NoiseSpec,
    Rows,
    Schedule,
    Tokenizer,
    draw_noise,
    load_tokenizer,
    prepare,
    read_documents,
)
from bd3lm.data.store import TokenArrays

Clip = tuple[float, float] | None

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
MASK_GOALS = {("unclipped", 4): (6.0, 4.0), ("clipped [.3,.8]", 4): (40.0, 30.0)}


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
            step = itertools.count()

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
                    bounds=MASK_GOALS.get((kind, block_size), (None, None)),
                )


# Packing


def group_texts(examples: dict[str, list[list[int]]], seq_len: int, bos: int, eos: int) -> Any:
    """Concatenate all documents of a batch and cut rows, each between BOS and EOS."""
    room = seq_len - 2
    joined = list(itertools.chain.from_iterable(examples["input_ids"]))
    rows = [[bos, *joined[i : i + room], eos] for i in range(0, len(joined) - room + 1, room)]
    return {"input_ids": rows, "attention_mask": [[1] * seq_len] * len(rows)}


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
            for start in range(0, len(rows), step := (1 << 14) // seq_len):
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
                bounds=bounds,
            )


# Text

TEXT_GOAL = (80.0, 50.0)


def bench_text(source: Path, name: str, work: Path, repeats: int) -> Iterator[Result]:
    """A jsonl file to a data set on disk with its rows, each text tokenized once a run."""
    if importlib.util.find_spec("datasets") is None:
        skip(f"text, {name}", "the package datasets is not installed")
        return
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(name)
    kind = "BERT" if "bert" in name else "GPT-2" if "gpt2" in name else name
    seq_len = 128 if kind == "BERT" else 1024
    inner = tokenizers.Tokenizer.from_str(tokenizer.json)
    _, bos, eos, _ = tokenizer.special
    number = itertools.count()
    made = prepare([source], tokenizer, work / "once")[0]
    report_disk(kind, work / "once", made.num_tokens, made.num_documents)

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
    yield compare(
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
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    print(f"{'':36} the peer's files: {size / made.num_tokens:.1f} bytes a token")


def report_disk(kind: str, folder: Path, tokens: int, documents: int) -> None:
    """What a data set takes, beside what its ids alone would."""
    size = sum((folder / name).stat().st_size for name in ("tokens.bin", "tokens.idx"))
    beside = (size - 2 * tokens) / documents
    print(f"disk, {kind}: {size:,} bytes, 2 a token and {beside:.2f} a document")


# Batches

BATCHES = 20
"""In one call."""
BATCH_GOALS = {1024: (40.0, 20.0), 128: (90.0, 50.0)}


def bench_batches(data: Dataset, repeats: int) -> Iterator[Result]:
    """Shuffled batches of rows; ours with their noise as well."""
    if importlib.util.find_spec("datasets") is None:
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

        for work, mine in (("shuffled", ours), ("shuffled and noised", noised)):
            yield compare(
                f"batches, {work} L={seq_len}",
                "DataLoader over datasets",
                BATCHES * batch_size * seq_len,
                mine,
                peer,
                repeats=repeats,
                bounds=bounds,
            )


def _endless(items: Any) -> Iterator[Any]:
    while True:
        yield from items


ROWS = ("masks", "packing", "text", "batches")


def corpus(sources: list[str], megabytes: float, folder: Path) -> Path:
    """A jsonl file of at most about so many megabytes."""
    shipped = str(files("bd3lm") / "assets" / "default_corpus.jsonl.xz")
    out = folder / "corpus.jsonl"
    size = 0
    with out.open("w", encoding="utf-8") as file:
        for text in itertools.chain.from_iterable(map(read_documents, sources or [shipped])):
            if size >= megabytes * 1e6:
                break
            # Books are cut into chapters' length, as the peer maps documents in lists.
            for start in range(0, len(text), 20_000):
                piece = text[start : start + 20_000]
                file.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
                size += len(piece.encode())
    return out


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--size", type=float, default=4.0, help="megabytes of text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--text", nargs="+", default=[], help="in place of the shipped corpus")
    parser.add_argument("--tokenizer", nargs="+", default=["default"], help="names or files")
    parser.add_argument("--out", default="target/bench/data_path.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    print(HEADER)
    if "masks" in args.rows:
        results += bench_masks(args.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = corpus(args.text, args.size, folder) if set(args.rows) - {"masks"} else folder
        if "text" in args.rows:
            for tokenizer in args.tokenizer:
                (folder / "text").mkdir()
                results += bench_text(source, tokenizer, folder / "text", min(args.repeats, 3))
                shutil.rmtree(folder / "text")
        if set(args.rows) & {"packing", "batches"}:
            first: Tokenizer = load_tokenizer(args.tokenizer[0])
            prepare([source], first, folder / "set")
            data = Dataset(folder / "set")
            if "packing" in args.rows:
                results += bench_packing(data, args.repeats)
            if "batches" in args.rows:
                results += bench_batches(data, args.repeats)
    save(Path(args.out), results)


def save(out: Path, results: list[Result]) -> None:
    """Write the rows, beside those that the file already holds."""
    kept = json.loads(out.read_text())["results"] if out.exists() else []
    made = [result.summary() for result in results]
    key = lambda row: (row["work"], row["peer_name"])  # noqa: E731
    rows = {key(row): row for row in (*kept, *made)}
    out.parent.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "numpy", "datasets", "tokenizers")
    record = {
        "machine": machine() | {name: version(name) for name in packages},
        "results": list(rows.values()),
    }
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
