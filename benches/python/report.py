"""Write the benchmarks' tables into docs/performance.md, each between its markers.

Each benchmark writes ``benches/results/NAME.json`` (``--out``) as {"machine": …, "results": …};
the function of its section turns that into Markdown. A section without a file is left alone.

Run: python benches/python/report.py [SECTION …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; ``head`` holds the titles between bars."""
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def ratio(value: dict[str, Any]) -> str:
    """A median with its extremes."""
    return f"**{value['median']:.1f}×** ({value['low']:.1f}–{value['high']:.1f})"


def millions(value: float) -> str:
    """Three figures, or all before the point."""
    value /= 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def where(machine: dict[str, Any]) -> str:
    """One sentence on the machine."""
    flags = ", ".join(flag.upper().replace("AVX512F", "AVX-512") for flag in machine["flags"])
    return (
        f"{machine['cores']} cores of an {machine['processor']} ({flags}), "
        f"{machine['memory_gb']} GB; Python {machine['python']}, PyTorch {machine['torch']}; "
        f"{machine['date']}."
    )


class Section(NamedTuple):
    """A marker's file in ``benches/results`` and the function that makes its Markdown."""

    file: str
    render: Callable[[Any], str]


def training_step(results: list[dict[str, Any]]) -> str:
    """Table of ours and the original's, a row a shape and precision of the original."""
    rows = []
    for r in results:
        peer = ["–", "–", "–", "–"]
        if "ratio" in r:
            peer = [
                f"{r['peer_precision']}: {r['peer_seconds']['median']:.2f} s",
                f"{r['peer_memory'] / 1e9:.2f} GB",
                ratio(r["ratio"]),
                f"1/{r['memory_ratio']:.1f}",
            ]
        ours = [f"{r['seconds']['median']:.2f} s", f"{r['memory'] / 1e9:.2f} GB"]
        mfu = f"{r['mfu']['median']:.0%} of {r['peak_flops'] / 1e9:.0f} GF/s"
        rows.append([r["case"], *ours, mfu, *peer])
    head = (
        "shape | ours, bf16 | peak memory | MFU | the original | its peak memory | "
        "time ratio (least–most) | memory"
    )
    return table(head, rows)


def attention(results: dict[str, Any]) -> str:
    """Milliseconds of ours, and the peers' as multiples of it."""
    rows = []
    for r in results["cases"]:
        c = r["case"]
        shape = f"B{c['batch']} H{c['heads']} L{c['seq_len']} D{c['width']} S{c['block']}"
        low, high = r["dense_ratio_quartiles"]
        rows.append(
            [
                f"{c['dtype']} {shape}",
                r["threads"],
                f"{r['rust_ms']:.0f} ms",
                f"{r['gflops']:.0f}",
                f"**{r['dense_ratio']:.1f}×** ({low:.1f}–{high:.1f})",
                f"{r['hierarchical_ratio']:.1f}×",
            ]
        )
    head = "shape | threads | ours | GF/s | dense SDPA (quartiles) | hierarchical PyTorch"
    notes = [
        f"Matrix products of {m['products_ms']:.1f} ms and attention of "
        f"{m['attention_ms']:.1f} ms, "
        f"interleaved, take {m['together_over_sum']:.2f} of their sum on "
        f"{m['threads']} thread(s)."
        for m in results["alternation"]
    ]
    return table(head, rows) + "\n\n" + "\n".join(notes)


def growth(results: dict[str, Any]) -> str:
    """µs a token over L and over S, and memory over L."""
    kinds = [(dtype, n) for dtype in ("bfloat16", "float32") for n in (1, 2)]

    def cells(over: str, value: int) -> list[str]:
        found = [
            r["microseconds"]
            for kind in kinds
            for r in results["times"]
            if r["over"] == over and r[over] == value and (r["dtype"], r["threads"]) == kind
        ]
        return [f"{x:.1f}" for x in found]

    def values(over: str) -> list[int]:
        return sorted({r[over] for r in results["times"] if r["over"] == over})

    heads = " | ".join(f"{dtype}, {n} thread(s)" for dtype, n in kinds)
    lengths = [
        [n, *cells("length", n), f"{results['memory'][str(n)] / 1e6:.0f} MB"]
        for n in values("length")
    ]
    blocks = [[n, *cells("block", n)] for n in values("block")]
    return (
        table(f"L, at S = 16 | {heads} | memory, bf16, one row", lengths)
        + "\n\n"
        + table(f"S, at L = 1024 | {heads}", blocks)
    )


def sampling(results: dict[str, Any]) -> str:
    """Tokens a second of ours and of the original, and the limit by memory bandwidth."""
    rows = []
    for name in ("1 row", "16 rows"):
        found = results[name]
        multiple = "–"
        if "ratio" in found:
            spread = {"median": found["ratio"], "low": found["low"], "high": found["high"]}
            multiple = ratio(spread)
        speed = f"{found['tokens_per_second']:.0f} tokens/s"
        rows.append([f"ours, {results['precision']}, {name}", speed, found["forwards"], multiple])
    if "peer" in results:
        peer = results["peer"]
        speed = f"{peer['tokens_per_second']:.1f} tokens/s"
        rows.append(["the original, fp32, 1 row", speed, peer["forwards"], ""])
    floor = results["floor"]
    rate = f"{floor['bytes'] / 1e6:.0f} MB a forward at {floor['bytes_per_second'] / 1e9:.0f} GB/s"
    limit = f"{floor['tokens_per_second']:.0f} tokens/s"
    rows.append([f"limit of one row: matrices read once, {rate}", limit, "", ""])
    return table("what | speed | forwards | of the original (least–most)", rows)


def speculation(results: dict[str, Any]) -> str:
    """Tokens a forward and a second of each way, temperature and number of rows."""

    def accepted(r: dict[str, Any]) -> str:
        places = zip(r.get("accepted", []), r.get("tried", []), strict=True)
        return ", ".join(f"{share:.2f}" for share, tried in places if tried >= 30) or "–"

    rows = [
        (
            r["way"],
            f"{r['temperature']:g}",
            r["rows"],
            f"{r['tokens_per_forward']:.2f}",
            f"{r['ceiling']:.2f}" if "ceiling" in r else "–",
            accepted(r),
            f"{r['tokens_per_second']:,.0f}",
        )
        for r in results["found"]
    ]
    head = (
        "way | temperature | rows | tokens a forward | ceiling | accepted, by place (30 tries or "
        "more) | tokens/s"
    )
    return f"{results['length']} tokens a row, top-p 1.\n\n" + table(head, rows)


def parallel_decoding(results: dict[str, Any]) -> str:
    """Forwards, perplexity and entropy of every way."""
    rows = [
        [
            r["way"] if r["value"] is None else f"{r['way']} {r['value']:g}",
            f"{r['forwards']:.2f}",
            f"{r['gen_ppl']:.0f}",
            f"{r['entropy']:.2f}",
        ]
        for r in results["found"]
    ]
    note = (
        f"{results['num']} rows of {results['length']} tokens, S = {results['block_size']}, "
        f"top-p 1, judged by {results['evaluator']}."
    )
    return note + "\n\n" + table("way | forwards a token | Gen. PPL | entropy, nats", rows)


GPUS = {"A100": 312e12, "H100": 989e12}
"""Dense bf16 operations a second, of NVIDIA's data sheets."""
GPU_MFU = 0.4
"""A usual share of them; nothing here was measured on a GPU."""


def lasting(seconds: float) -> str:
    """A time in its largest unit."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s"


def presets(results: dict[str, Any]) -> str:
    """Size, memory and time of every preset."""
    rows = []
    for r in results["presets"]:
        memory = f"{r['memory'] / 1e9:.1f} GB"
        if r["measured_rows"] < r["rows"]:
            few = f"{r['micro_batch_memory'] / 1e9:.1f} with --micro-batch {r['measured_rows']}"
            memory = f"{memory} ({few})"
        step = r["seconds"]["median"]
        gpus = [lasting(r["steps"] * r["flops"] / (GPU_MFU * peak)) for peak in GPUS.values()]
        if r["flops"] < 1e12:  # too small to keep one busy
            gpus = ["–"] * len(GPUS)
        rows.append(
            [
                r["preset"],
                f"{r['parameters'] / 1e6:.1f}M",
                f"{r['rows']} × {r['length']}",
                f"{r['flops'] / 1e12:.3g}",
                memory,
                f"{step:.2g} s" if step < 100 else lasting(step),
                f"{lasting(step * r['steps'])} ({r['steps']:,} steps)",
                *gpus,
            ]
        )
    names = [f"the run on one {name}, estimated" for name in GPUS]
    head = ["preset", "parameters", "rows × L a step", "TFLOP a step", "memory, estimated"]
    head += ["a step", "the run", *names]
    return table(" | ".join(head), rows)


def cold_rows(results: dict[str, Any]) -> str:
    """Speed of rows that are in memory and of those that are not."""
    rows = [
        [
            f"L={r['seq_len']}, {r['way']}",
            f"{r['batch_ms']['median']:.2f} ms",
            f"{r['batch_ms']['high']:.1f} ms",
            f"{r['rows_per_second']:,.0f}",
        ]
        for r in results["found"]
    ]
    head = (
        f"{results['gigabytes']:g} GB | batch of {results['batch_size']}, median | slowest | rows/s"
    )
    return table(head, rows)


def remote_rows(results: dict[str, Any]) -> str:
    """Speed and traffic of rows in object storage."""
    rows = [
        [
            f"L={r['seq_len']}, {r['way']}",
            f"{r['rows_per_second']:,.0f}",
            f"{r['requests_per_row']:.2f}" if "requests_per_row" in r else "",
            f"{r['bytes_per_row_byte']:.1f}" if "bytes_per_row_byte" in r else "",
        ]
        for r in results["found"]
    ]
    head = f"{results['megabytes']:g} MB | rows/s | requests a row | bytes read for each of a row"
    return table(head, rows)


def data_path(results: dict[str, Any]) -> str:
    """Text to rows, masks, packing and batches against their peers, and the cost of preparing."""
    compared = [r for r in results["rows"] if r["peer_name"] is not None]

    def cells(r: dict[str, Any]) -> list[str]:
        spread = {"median": r["ratio"], "low": r["ratio_min"], "high": r["ratio_max"]}
        speeds = [millions(r[f"{who}_tokens_per_second"]) for who in ("ours", "peer")]
        return [r["work"], r["peer_name"], *speeds, ratio(spread)]

    head = "work | peer | ours, Mtokens/s | peer | ratio (least–most)"
    texts = [
        [
            *cells(r),
            f"2 a token, {r['bytes_a_document']:.1f} a document",
            f"{r['peer_bytes_a_token']:.1f} a token",
        ]
        for r in compared
        if "bytes" in r
    ]
    others = [cells(r) for r in compared if "bytes" not in r]
    prepared = [
        [
            r["work"],
            f"{r['seconds']:.2f} s ({r['seconds_min']:.2f}–{r['seconds_max']:.2f})",
            millions(r["tokens"] / r["seconds"]),
            f"**{r['peak'] / 1e6:.0f} MB**",
        ]
        for r in results["rows"]
        if r["peer_name"] is None
    ]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    disturbed = max(r["others_max"] for r in compared)
    runs = min(r["runs"] for r in compared)
    return "\n\n".join(
        [
            f"{versions}. Medians of {runs} interleaved pairs or more; other processes took "
            "at most "
            f"{disturbed:.0%} of the machine.",
            table(f"{head} | bytes on disk | the peer's", texts),
            table("preparing | time (least–most) | Mtokens/s | peak memory", prepared),
            table(head, others),
        ]
    )


def tokenizing(results: dict[str, Any]) -> str:
    """Speeds of a row each for the tokenizers, and our multiple of the peers'."""
    rows = []
    for r in results["rows"]:
        speeds = r["speeds"]
        row = [r["tokenizer"], millions(speeds["ours"])]
        for peer in ("datasets", "gigatoken"):
            found = peer in r
            row += [millions(speeds[peer]), ratio(r[peer])] if found else ["–", "–"]
        rows.append(row)
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    runs = min(r["runs"] for r in results["rows"])
    head = "tokenizer | ours, Mtokens/s | datasets | ratio (least–most) | gigatoken | ratio"
    return f"{versions}. Medians of {runs} pairs in turn.\n\n" + table(head, rows)


SECTIONS: dict[str, Section] = {
    "training-step": Section("training_step.json", training_step),
    "attention": Section("cpu_attention.json", attention),
    "growth": Section("growth.json", growth),
    "sampling": Section("sampling.json", sampling),
    "data-path": Section("data_path.json", data_path),
    "presets": Section("presets.json", presets),
    "tokenizing": Section("tokenizing.json", tokenizing),
    "cold-rows": Section("cold_rows.json", cold_rows),
    "remote-rows": Section("remote_rows.json", remote_rows),
    "speculation": Section("speculation.json", speculation),
    "parallel-decoding": Section("parallel_decoding.json", parallel_decoding),
}


def put(document: str, name: str, text: str) -> str:
    """``document`` with ``text`` between ``<!-- name -->`` and ``<!-- /name -->``."""
    before, rest = document.split(f"<!-- {name} -->\n")
    after = rest.split(f"<!-- /{name} -->")[1]
    return f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}"


def main() -> None:
    """Write the sections that are named, or all that have a file."""
    document = DOCUMENT.read_text(encoding="utf-8")
    for name in sys.argv[1:] or SECTIONS:
        file = RESULTS / SECTIONS[name].file
        if not file.is_file():
            print(f"{name}: no {file.name}, left as it is")
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        text = f"{where(record['machine'])}\n\n{SECTIONS[name].render(record['results'])}"
        document = put(document, name, text)
    DOCUMENT.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
