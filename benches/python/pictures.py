"""Draw the benchmarks' pictures in docs/ from the files in ``benches/results``.

Run: python benches/python/pictures.py [NAME …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bd3lm.plots import COLOURS, DASHES, MARKERS, save

DOCS = Path(__file__).parents[2] / "docs"


def new_figure(width: float, height: float, title: str) -> Figure:
    """A figure in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure


def style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the n-th curve."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linewidth": 1.2,
        "markersize": 4.5,
    }


def finish(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Labels, a grid, no frame at the top and right."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def growth(results: dict[str, Any]) -> Figure:
    """Time a token over L and over S, and memory over L."""
    figure = new_figure(11, 3.6, "Attention on a CPU, forward and backward: H = 8, D = 32")
    over_l, over_s, of_memory = figure.subplots(1, 3)
    for axes, over in ((over_l, "length"), (over_s, "block")):
        curves = [(n, d) for n in (1, 2) for d in ("bfloat16", "float32")]
        for index, (threads, dtype) in enumerate(curves):
            mine = [
                r
                for r in results["times"]
                if (r["over"], r["threads"], r["dtype"]) == (over, threads, dtype)
            ]
            x, y = [r[over] for r in mine], [r["microseconds"] for r in mine]
            name = f"{dtype}, {threads} thread{'s' if threads > 1 else ''}"
            axes.plot(x, y, label=name, **style(index))
    memory = {int(length): size / 1e6 for length, size in results["memory"].items()}
    of_memory.plot(list(memory), list(memory.values()), **style(0))
    finish(over_l, "L (S = 16)", "µs a token")
    finish(over_s, "S (L = 1024)", "µs a token")
    finish(of_memory, "L (S = 16, one row, bfloat16)", "MB beyond the inputs")
    for axes, ticks in ((over_l, (128, 1024, 8192)), (over_s, (1, 8, 64, 512))):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, labels=map(str, ticks))
    of_memory.set_xscale("log", base=2)
    of_memory.set_xticks((128, 1024, 8192), labels=("128", "1024", "8192"))
    for axes in (over_l, over_s, of_memory):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda *_: "")
    over_s.set_yscale("linear")
    over_s.set_ylim(0, None)
    handles, names = over_l.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def oracle(results: dict[str, Any]) -> Figure:
    """Total variation to the source against forwards, a curve a rule."""
    title = (
        f"two states, {results['stay']:.0%} to stay, one block of {results['size']}, "
        f"{results['num']:,} rows"
    )
    figure = new_figure(6.4, 4.2, title)
    axes = figure.subplots()
    rules = list(dict.fromkeys(r["rule"] for r in results["found"]))
    for index, rule in enumerate(rules):
        mine = [r for r in results["found"] if r["rule"] == rule]
        x, y = [r["forwards"] for r in mine], [r["total_variation"] for r in mine]
        # Exact rules share a point: larger hollow markers lie around smaller ones.
        alone = {"markersize": 11 - 2.5 * index, "fillstyle": "none"} if index < 3 else {}
        if index >= len(MARKERS):
            alone = {"marker": "*", "markersize": 9}
        axes.plot(x, y, label=rule, **style(index) | alone)
    floor = results["found"][0]["floor"]
    axes.axhline(floor, color="0.4", linestyle=":", label="exact draws, expected")
    finish(axes, "forwards a token", "total variation to the source")
    axes.set_ylim(0, None)
    axes.legend(fontsize=8, frameon=False)
    return figure


def parallel_decoding(results: dict[str, Any]) -> Figure:
    """Generative perplexity and entropy against forwards, a curve a way of decoding."""
    title = (
        f"{results['num']} rows of {results['length']} tokens, S = {results['block_size']}, "
        f"top-p 1, judged by {results['evaluator']}"
    )
    figure = new_figure(9, 3.6, title)
    ways = list(dict.fromkeys(r["way"] for r in results["found"]))
    labels = {"gen_ppl": "Gen. PPL", "entropy": "entropy, nats (bars: standard error)"}
    panels = figure.subplots(1, 2)
    for axes, (field, label) in zip(panels, labels.items(), strict=True):
        has_errors = any(f"{field}_error" in r for r in results["found"])
        for index, way in enumerate(ways):
            mine = [r for r in results["found"] if r["way"] == way]
            x, y = [r["forwards"] for r in mine], [r[field] for r in mine]
            errors = [r[f"{field}_error"] for r in mine] if has_errors else None
            axes.errorbar(x, y, yerr=errors, label=way, capsize=2, **style(index))
        finish(axes, "forwards a token", label if has_errors else label.split(" (")[0])
    panels[0].legend(fontsize=8, frameon=False)
    return figure


PICTURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "growth": growth,
    "oracle": oracle,
    "parallel_decoding": parallel_decoding,
}


def main() -> None:
    """Draw the pictures that are named, or all that have a file."""
    for name in sys.argv[1:] or PICTURES:
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            print(f"{name}: no {file.name}, left as it is")
            continue
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        save(PICTURES[name](results), DOCS / f"{name}.png")


if __name__ == "__main__":
    main()
