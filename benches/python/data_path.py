"""The data path against what one would otherwise use: ours and the peer in turn, ratio by ratio.

Peers, each skipped with a sentence where it is not installed:
  * text to packed rows: Hugging Face ``datasets`` and ``tokenizers``, mapped and grouped as
    language-model scripts do;
  * grouping alone: the same function over lists of ids;
  * masks: one uniform number a token in PyTorch, compared with the level of its block; clipped,
    drawn again until every block is inside;
  * shuffled batches: PyTorch's DataLoader over a ``datasets`` table in torch format.

``BD3LM_PEER`` may name a folder with the original implementation; its mask and grouping functions
are then measured as well.

Run: python benches/python/data_path.py [--size MB] [--repeats N] [--text FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
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

Step = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """One comparison: medians of tokens a second, and of the ratios of neighbouring runs."""

    work: str
    peer: str
    tokens: int
    ours_per_second: float
    peer_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float


def seconds(step: Step) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(
    work: str,
    peer_name: str,
    tokens: int,
    ours: Step,
    peer: Step,
    repeats: int,
    inner: int = 1,
    cold: bool = False,
) -> Result:
    """Run both in turn; ``inner`` calls of ours are one run, so that neither is too short.

    With ``cold`` nothing is warmed up: work that is never repeated in practice.
    """

    def many() -> None:
        for _ in range(inner):
            ours()

    if not cold:
        many()
        peer()
    pairs = [(seconds(many) / inner, seconds(peer)) for _ in range(repeats)]
    ratios = [b / a for a, b in pairs]
    result = Result(
        work,
        peer_name,
        tokens,
        tokens / statistics.median(a for a, _ in pairs),
        tokens / statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )
    print(
        f"{work:34} {peer_name:26} {result.ours_per_second / 1e6:9.1f} "
        f"{result.peer_per_second / 1e6:9.2f} {result.ratio:8.1f}x "
        f"({result.ratio_low:.1f}-{result.ratio_high:.1f})",
        flush=True,
    )
    return result


def skip(work: str, reason: str) -> None:
    """Say why something is not measured."""
    print(f"{work:34} skipped: {reason}")


# Masks


def peer_masks(levels: Tensor, block_size: int, clip: tuple[float, float] | None) -> Tensor:
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


def peer_noise(rows: int, blocks: int, block_size: int, clip: tuple[float, float] | None) -> Tensor:
    """Stratified levels, then masks."""
    strata = torch.arange(rows * blocks).view(rows, blocks) / (rows * blocks)
    levels = (torch.rand(rows, blocks) / (rows * blocks) + strata) % 1
    low, high = clip or (1e-3, 1.0)
    return peer_masks(levels * (high - low) + low, block_size, clip)


def bench_masks(repeats: int) -> Iterator[Result]:
    """Noise of rows that are already there, one thread each."""
    rows, seq_len = 512, 128
    x0 = torch.zeros(rows, seq_len, dtype=torch.int64)
    noisable = torch.ones(rows, seq_len, dtype=torch.bool)
    schedule = Schedule("loglinear")
    original = original_masks()
    for block_size in (4, 16):
        for name, clip in (("unclipped", None), ("clipped [.3,.8]", (0.3, 0.8))):
            spec = NoiseSpec(schedule, clip=clip, resample=clip is not None)
            step = iter(range(1 << 30))

            def ours(spec: NoiseSpec = spec, s: int = block_size, step: Any = step) -> Any:
                return draw_noise(spec, x0, noisable, s, seed=1, step=next(step))

            blocks = seq_len // block_size
            work = f"masks {name} L=128 S={block_size}"
            peers: dict[str, Step] = {
                "torch": lambda b=blocks, s=block_size, c=clip: peer_noise(rows, b, s, c)
            }
            if original is not None:
                peers["original"] = lambda s=block_size, c=clip: original(rows, seq_len, s, c)
            for peer_name, peer in peers.items():
                yield compare(work, peer_name, x0.numel(), ours, peer, repeats, inner=10)
        counted = NoiseSpec(schedule, estimator="count")
        step = iter(range(1 << 30))

        def count(spec: NoiseSpec = counted, s: int = block_size, step: Any = step) -> Any:
            return draw_noise(spec, x0, noisable, s, seed=1, step=next(step))

        blocks = seq_len // block_size
        yield compare(
            f"masks count L=128 S={block_size}",
            "torch (its unclipped masks)",
            x0.numel(),
            count,
            lambda b=blocks, s=block_size: peer_noise(rows, b, s, None),
            repeats,
            inner=10,
        )


def original_functions(file: str, names: tuple[str, ...]) -> dict[str, Callable[..., Any]] | None:
    """Functions or methods of the original, taken out of its file: it need not import here."""
    path = Path(os.environ.get("BD3LM_PEER", ""), file)
    if "BD3LM_PEER" not in os.environ or not path.is_file():
        skip(f"original {', '.join(names)}", f"BD3LM_PEER does not name a folder with {file}")
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.stmt] = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    found: dict[str, Any] = {"torch": torch, "itertools": itertools}
    exec(compile(ast.Module(nodes, []), str(path), "exec"), found)
    return {name: found[name] for name in names}


def original_masks() -> Callable[[int, int, int, tuple[float, float] | None], Any] | None:
    """The original's levels and masks, as methods of a stand-in that holds their settings."""
    methods = original_functions("diffusion.py", ("_sample_t", "q_xt", "_resample_q_xt"))
    if methods is None:
        return None

    def run(rows: int, seq_len: int, block_size: int, clip: tuple[float, float] | None) -> Any:
        low, high = clip or (1e-3, 1.0)
        config = SimpleNamespace(
            training=SimpleNamespace(resample=clip is not None),
            model=SimpleNamespace(length=seq_len),
        )
        me = SimpleNamespace(
            block_size=block_size, mask_index=3, antithetic_sampling=True, config=config
        )
        me._resample_q_xt = MethodType(methods["_resample_q_xt"], me)
        shape, cpu = (rows, seq_len), torch.device("cpu")
        p = methods["_sample_t"](me, shape, cpu, low, high, block_size)
        return methods["q_xt"](me, torch.zeros(shape, dtype=torch.int64), p, block_size, low, high)

    return run


# Packing and text


def group_texts(examples: dict[str, list[list[int]]], seq_len: int, bos: int, eos: int) -> Any:
    """Concatenate all documents of a batch and cut rows, each between BOS and EOS."""
    room = seq_len - 2
    joined = list(itertools.chain.from_iterable(examples["input_ids"]))
    rows = [[bos, *joined[i : i + room], eos] for i in range(0, len(joined) - room + 1, room)]
    return {"input_ids": rows, "attention_mask": [[1] * seq_len] * len(rows)}


def bench_packing(
    documents: list[list[int]], tokenizer: Tokenizer, repeats: int
) -> Iterator[Result]:
    """Ids of documents to rows in memory."""
    vocab_size, bos, eos, mask = tokenizer.special
    data = TokenArrays(documents, vocab_size=vocab_size, bos_id=bos, eos_id=eos, mask_id=mask)
    tokens = sum(map(len, documents))
    original = original_functions("dataloader.py", ("_group_texts",))
    for seq_len in (1024, 128):

        def ours(seq_len: int = seq_len) -> Any:
            rows = Rows(data, seq_len=seq_len, block_size=16, row_eos=True)
            for start in range(0, len(rows), step := (1 << 16) // seq_len):
                stop = min(start + step, len(rows))
                rows.batch(np.arange(start, stop, dtype=np.uint64))

        def peer(group: Callable[..., Any], seq_len: int = seq_len) -> None:
            for i in range(0, len(documents), 1000):
                group({"input_ids": documents[i : i + 1000]}, seq_len, bos, eos)

        peers = {"group_texts in Python": group_texts}
        if original is not None:
            peers["original"] = original["_group_texts"]
        for name, group in peers.items():
            yield compare(
                f"packing L={seq_len}",
                name,
                tokens,
                ours,
                lambda group=group, peer=peer: peer(group),
                repeats,
                inner=10,
            )


def bench_text(
    source: Path, tokenizer: Tokenizer, name: str, seq_len: int, work: Path
) -> Iterator[Result]:
    """A jsonl file to packed rows on disk, each text tokenized once."""
    if importlib.util.find_spec("datasets") is None:
        skip(f"text to rows, {name}", "the package datasets is not installed")
        return
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    inner = tokenizers.Tokenizer.from_str(tokenizer.json)
    _, bos, eos, _ = tokenizer.special
    counts = iter(range(1 << 30))
    made = prepare([source], tokenizer, work / f"{name}-once")[0]

    def ours() -> None:
        out = work / f"{name}-{next(counts)}"
        prepare([source], tokenizer, out)
        Rows(Dataset(out), seq_len=seq_len, block_size=16, row_eos=True)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = inner.encode_batch(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*e.ids, eos] for e in encoded]}

    original = original_functions("dataloader.py", ("_group_texts",))
    group = group_texts if original is None else original["_group_texts"]

    def peer() -> None:
        cache = work / f"{name}-{next(counts)}"
        table = datasets.load_dataset(
            "json", data_files=str(source), split="train", cache_dir=str(cache)
        )
        table = table.select_columns(["text"])
        table = table.map(tokenize, batched=True, remove_columns=table.column_names)
        table = table.map(
            lambda batch: group(batch, seq_len, bos, eos),
            batched=True,
            remove_columns=table.column_names,
        )
        table.save_to_disk(str(cache / "rows"))

    yield compare(
        f"text to rows, {name} L={seq_len}",
        f"datasets {datasets.__version__}" + ("" if original is None else " + original"),
        made.num_tokens,
        ours,
        peer,
        3,
        cold=True,
    )


# Batches

BATCHES = 20
"""In one run."""


def bench_batches(data: Dataset, repeats: int) -> Iterator[Result]:
    """Shuffled batches of rows; ours with their noise as well."""
    if importlib.util.find_spec("datasets") is None:
        skip("shuffled batches", "the package datasets is not installed")
        return
    import datasets

    spec = NoiseSpec(Schedule("loglinear"), estimator="count")
    for seq_len, batch_size in ((1024, 16), (128, 128)):
        rows = Rows(data, seq_len=seq_len, block_size=16, row_eos=True)
        clean = rows.batch(np.arange(len(rows), dtype=np.uint64)).x0.numpy()
        table = datasets.Dataset.from_dict({"input_ids": clean}).with_format("torch")
        torch.manual_seed(0)
        batches = iter(_endless(torch.utils.data.DataLoader(table, batch_size, shuffle=True)))
        draw = np.random.default_rng(0)
        loader = Loader(rows, batch_size, seed=0)
        step = iter(range(1 << 30))

        def ours(rows: Rows = rows, batch_size: int = batch_size, draw: Any = draw) -> None:
            for _ in range(BATCHES):
                rows.batch(draw.integers(0, len(rows), batch_size, dtype=np.uint64))

        def noised(loader: Loader = loader, step: Iterator[int] = step) -> None:
            for _ in range(BATCHES):
                loader.batch(next(step), spec)

        def peer(batches: Iterator[Any] = batches) -> None:
            for _ in range(BATCHES):
                next(batches)

        tokens = BATCHES * batch_size * seq_len
        peer_name = "DataLoader over datasets"
        yield compare(
            f"batches, clean L={seq_len}", peer_name, tokens, ours, peer, repeats, inner=5
        )
        yield compare(
            f"batches, noised L={seq_len}", peer_name, tokens, noised, peer, repeats, inner=5
        )


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def corpus(source: str | None, megabytes: float, folder: Path) -> Path:
    """A jsonl file of at most about so many megabytes."""
    path = (
        Path(source) if source else Path(str(files("bd3lm") / "assets" / "default_corpus.jsonl.xz"))
    )
    texts = read_documents(path)
    out = folder / "corpus.jsonl"
    wanted, size = megabytes * 1e6, 0
    with out.open("w", encoding="utf-8") as file:
        for text in texts:
            # Books are cut into chapters' length, as the peer maps documents in lists.
            for start in range(0, len(text), 20_000):
                piece = text[start : start + 20_000]
                file.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
                size += len(piece.encode())
            if size >= wanted:
                break
    return out


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=4.0, help="megabytes of text")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--text", help="a text file in place of the shipped corpus")
    parser.add_argument("--tokenizer", action="append", help="in place of the shipped one")
    parser.add_argument("--out", default="target/bench/data_path.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    print(f"{'work':34} {'peer':26} {'ours':>9} {'peer':>9} {'ratio':>9} (Mtokens/s; min-max)")
    results = list(bench_masks(args.repeats))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = corpus(args.text, args.size, folder)
        names = args.tokenizer or ["default"]
        tokenizers = {Path(name).stem: load_tokenizer(name) for name in names}
        for key, tokenizer in tokenizers.items():
            seq_len = 128 if "bert" in key else 1024
            results += bench_text(source, tokenizer, key, seq_len, folder)
        first = next(iter(tokenizers))
        prepare([source], tokenizers[first], folder / "set")
        data = Dataset(folder / "set")
        documents = [data.document(i).tolist() for i in range(data.num_documents)]
        results += bench_packing(documents, tokenizers[first], args.repeats)
        results += bench_batches(data, args.repeats)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    record = {"machine": machine, "results": [asdict(r) for r in results]}
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
