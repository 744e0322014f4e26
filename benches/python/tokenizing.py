"""Text to ids with tokenizers of many kinds: ours, ``datasets`` and gigatoken in turn.

Ours is ``prepare``: it reads a jsonl file and the tokenizer's definition, and writes a verified
data set. ``datasets`` maps the ``tokenizers`` library over the same file with a process a core, as
language-model scripts do, less their grouping into rows; it takes an eighth of the documents,
because its speed does not depend on their number. gigatoken reads the file and the definition and
writes ids and lengths with numpy.

``BD3LM_TEST_DATA`` may name a folder whose ``data`` holds 100 MB of books, government pages and the
vocabularies of GPT-2 and BERT. Tokenizers of Llama 3, Qwen 3, Mistral and DeepSeek are measured
where packages that carry their vocabularies are installed (``make check-extras``).

    python benches/python/tokenizing.py
    python benches/python/tokenizing.py --tokenizers "Llama 3" --repeats 5
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write
from data_path import corpus, shared_data, vocabularies
from timing import Step, measure, skip
from vocabularies import published

from bd3lm.data import load_tokenizer, prepare

PUBLISHED = ("Llama 3", "Qwen 3", "Mistral", "DeepSeek")
SHARE = 8
"""``datasets`` takes one document of so many."""
GOALS = {"datasets": 50.0, "gigatoken": 1.0}


def definitions(folder: Path, wanted: Sequence[str]) -> dict[str, Path | str]:
    """Files or names of the tokenizers that are at hand."""
    found: dict[str, Path | str] = {
        kind: name for kind, (name, _) in vocabularies(shared_data()).items() if kind in wanted
    }
    for kind, text in published(wanted):
        file = folder / f"{kind.replace(' ', '-')}.json"
        file.write_text(text, encoding="utf-8")
        found[kind] = file
    for kind in set(wanted) - found.keys():
        skip(kind, "its vocabulary is not there; make check-extras installs it")
    return found


def datasets_map(source: Path, definition: Path, eos: int, work: Path) -> Step:
    """Tokenize with the library in as many processes as there are cores."""
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    inner = tokenizers.Tokenizer.from_file(str(definition))
    number = itertools.count()

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = inner.encode_batch(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*e.ids, eos] for e in encoded]}

    def run() -> None:
        cache = str(work / f"datasets-{next(number)}")
        table = datasets.load_dataset(
            "json", data_files=str(source), split="train", cache_dir=cache
        ).select_columns(["text"])
        columns = table.column_names
        table.map(tokenize, batched=True, remove_columns=columns, num_proc=os.cpu_count())

    return run


def gigatoken_files(source: Path, definition: Path, wide: bool, work: Path) -> Step:
    """Encode with gigatoken, and write its ids and lengths."""
    import awkward
    import gigatoken

    gigatoken.Tokenizer(definition)  # a definition that it does not load is an error here

    def run() -> None:
        read = gigatoken.JsonlFileSource([str(source)], field="text")
        ids = gigatoken.Tokenizer(definition).encode_files(read)
        flat = np.asarray(awkward.flatten(ids, axis=1))
        flat.astype(np.int32 if wide else np.uint16).tofile(work / "gigatoken.bin")
        np.asarray(awkward.num(ids)).tofile(work / "gigatoken.idx")

    return run


def bench(source: Path, kind: str, name: Path | str, work: Path, repeats: int) -> dict[str, Any]:
    """Speeds in tokens a second, each of the peers' between two of ours."""
    tokenizer = load_tokenizer(name)
    definition, part = work / "definition.json", work / "part.jsonl"
    definition.write_text(tokenizer.json, encoding="utf-8")
    with source.open(encoding="utf-8") as lines:
        part.write_text("".join(itertools.islice(lines, 0, None, SHARE)), encoding="utf-8")
    number = itertools.count()

    def ours() -> None:
        prepare([source], tokenizer, work / f"ours-{next(number)}")

    all_tokens = prepare([source], tokenizer, work / "all")[0].num_tokens
    some_tokens = prepare([part], tokenizer, work / "some")[0].num_tokens
    peers: dict[str, tuple[Step, int]] = {}
    if find_spec("datasets") is None:
        skip(kind, "the package datasets is not installed")
    else:
        step = datasets_map(part, definition, tokenizer.eos_id, work)
        peers["datasets"] = step, some_tokens
    if find_spec("gigatoken") is None:
        skip(kind, "the package gigatoken is not installed")
    else:
        try:
            step = gigatoken_files(source, definition, tokenizer.vocab_size > 1 << 16, work)
            peers["gigatoken"] = step, all_tokens
        except Exception as error:
            skip(kind, f"gigatoken: {' '.join(str(error).split())[:80]}")
    speeds: dict[str, list[float]] = {"ours": []}
    ratios: dict[str, list[float]] = {}
    for _ in range(repeats):
        for peer, (step, tokens) in peers.items():
            before, theirs, after = measure(ours), measure(step), measure(ours)
            mine = 2 * all_tokens / (before.wall + after.wall)
            speeds["ours"] += [all_tokens / before.wall, all_tokens / after.wall]
            speeds.setdefault(peer, []).append(tokens / theirs.wall)
            ratios.setdefault(peer, []).append(mine / (tokens / theirs.wall))
    row: dict[str, Any] = {"tokenizer": kind, "tokens": all_tokens, "runs": repeats}
    row["speeds"] = {who: statistics.median(found) for who, found in speeds.items()}
    for peer, found in ratios.items():
        spread = {"median": statistics.median(found), "low": min(found), "high": max(found)}
        row[peer] = spread
        reached = "reached" if spread["median"] >= GOALS[peer] else "not reached"
        print(
            f"{kind:10} ours {row['speeds']['ours'] / 1e6:6.1f} Mtokens/s, {peer} "
            f"{row['speeds'][peer] / 1e6:7.3f}: {spread['median']:.2f}x "
            f"({spread['low']:.2f}-{spread['high']:.2f}); goal {GOALS[peer]:g}x {reached}",
            flush=True,
        )
    return row


def main() -> None:
    """Measure, print, write JSON."""
    names = [*vocabularies(shared_data()), *PUBLISHED]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizers", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "tokenizing.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = corpus(shared_data(), folder)
        for kind, definition in definitions(folder, args.tokenizers).items():
            work = folder / "work"
            work.mkdir()
            rows.append(bench(source, kind, definition, work, args.repeats))
            shutil.rmtree(work)
    packages = [name for name in ("datasets", "tokenizers", "gigatoken") if find_spec(name)]
    write(args.out, {"versions": {name: version(name) for name in packages}, "rows": rows})


if __name__ == "__main__":
    main()
