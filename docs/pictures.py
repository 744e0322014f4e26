"""Draw the pictures of the documentation into docs/img, as SVG for light and dark pages.

Run: python docs/pictures.py                        every picture
     python docs/pictures.py --record CHECKPOINT    first record a new sample for the denoising ones

The denoising pictures show a recorded sample, docs/img/denoising.json, so that they can be drawn
again without a trained model. The colours are Okabe and Ito's, which
colour-blind readers can tell apart.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Path2D

IMAGES = Path(__file__).parent / "img"
TRACE = IMAGES / "denoising.json"

INK, FAINT = "#24292f", "#8c959f"
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW = (
    "#0072b2 #e69f00 #009e73 #cc79a7 #56b4e9 #d55e00 #f0e442".split()
)
DARK = {INK: "#e6edf3", FAINT: "#7d8590", BLUE: "#4ba3e3", GREEN: "#2fbf94"}
"""Colours that a page with a dark background replaces."""

STYLE = {
    "svg.hashsalt": "bd3lm",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def save(figure: Figure, path: Path) -> None:
    """Write an SVG with a transparent ground, whose colours follow the reader's colour scheme."""
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
    text = path.read_text(encoding="utf-8")
    names = {color: f"--c{index}" for index, color in enumerate(DARK)}
    for color, name in names.items():
        text = text.replace(color, f"var({name})")
    light = ";".join(f"{name}:{color}" for color, name in names.items())
    dark = ";".join(f"{names[color]}:{other}" for color, other in DARK.items())
    style = f"svg{{{light}}}@media (prefers-color-scheme: dark){{svg{{{dark}}}}}"
    text = text.replace("<defs>", f"<style>{style}</style>\n <defs>", 1)
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def blank(width: float, height: float, x: float, y: float) -> tuple[Figure, Axes]:
    """A figure of ``width`` by ``height`` inches with one canvas of ``x`` by ``y`` units."""
    figure = Figure(figsize=(width, height))
    return figure, canvas(figure, (0, 0, 1, 1), x, y)


def canvas(figure: Figure, rect: tuple[float, float, float, float], x: float, y: float) -> Axes:
    """A part of a figure, of ``x`` by ``y`` units, without ticks; y grows downwards."""
    axes = figure.add_axes(rect)
    axes.set_xlim(0, x)
    axes.set_ylim(y, 0)
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, width: float, edge: str, text: str, **how: Any) -> None:
    """A rounded cell with centred text."""
    alpha, height = how.pop("alpha", 0.28), how.pop("height", 0.8)
    axes.add_patch(
        FancyBboxPatch(
            (x + 0.06, y - height / 2),
            width - 0.12,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=(*mpl.colors.to_rgb(edge), alpha),
            edgecolor=edge,
            linewidth=1,
        )
    )
    axes.text(x + width / 2, y, text, ha="center", va="center", **how)


def overview() -> Figure:
    """Two blocks denoising, and the mask that trains them."""
    figure = Figure(figsize=(10.4, 3.4))
    trace = json.loads(TRACE.read_text(encoding="utf-8"))
    lines = [step for step in trace["steps"] if step[0] < 3 * trace["block_size"]]
    across, down = denoising_size(trace, lines)
    draw_denoising(canvas(figure, (0, 0.04, 0.62, 0.96), across, down), trace, lines)
    draw_mask(canvas(figure, (0.67, 0, 0.33, 1), 31, 28.5), 12, 4, font=8)
    return figure


def mask() -> Figure:
    """Training mask: the keys that each query sees, L = 12 and S = 4."""
    figure, axes = blank(6.6, 6.2, 33, 31)
    draw_mask(axes, 12, 4)
    legend = (
        (ORANGE, "its own noised block"),
        (BLUE, "clean blocks before it"),
        (GREEN, "clean, up to its block"),
    )
    for index, (color, text) in enumerate(legend):
        x = 2.0 + index * 9.8
        axes.add_patch(Rectangle((x, 29.2), 0.9, 0.9, facecolor=color))
        axes.text(x + 1.3, 29.65, text, va="center", fontsize=9)
    return figure


def draw_mask(axes: Axes, length: int, size: int, font: float = 10) -> None:
    """Draw the mask of a row of ``length`` tokens, a unit a key."""
    bold = {"ha": "center", "va": "center", "fontweight": "bold", "fontsize": font}
    plain = {"va": "center", "fontsize": 0.8 * font}
    faint = {"ha": "center", "va": "center", "color": FAINT, "fontsize": 0.9 * font}
    left, top, end = 6.6, 4.1, 2 * length - 0.1
    block = np.arange(length) // size
    cells: dict[str, list[tuple[float, float]]] = {ORANGE: [], BLUE: [], GREEN: [], FAINT: []}
    for q in range(2 * length):
        for k in range(2 * length):
            noised_q, noised_k = q < length, k < length
            bq, bk = block[q % length], block[k % length]
            color = FAINT
            if noised_q and noised_k and bq == bk:
                color = ORANGE
            elif noised_q and not noised_k and bq > bk:
                color = BLUE
            elif not noised_q and not noised_k and bq >= bk:
                color = GREEN
            cells[color].append((left + k, top + q))
    square = np.array([(0, 0), (0.9, 0), (0.9, 0.9), (0, 0.9), (0, 0)])
    for color, corners in cells.items():
        path = Path2D.make_compound_path(*(Path2D(square + corner) for corner in corners))
        shade = (*mpl.colors.to_rgb(color), 0.16) if color == FAINT else color
        axes.add_patch(PathPatch(path, facecolor=shade, edgecolor="none"))
    for at in range(size, length, size):
        for start in (0, length):
            edge = {"color": FAINT, "linewidth": 0.8}
            axes.plot([left + start + at - 0.05] * 2, [top - 0.2, top + end], **edge)
            axes.plot([left - 0.2, left + end], [top + start + at - 0.05] * 2, **edge)
    strong = {"color": INK, "linewidth": 1.6}
    axes.plot([left + length - 0.05] * 2, [top - 1.2, top + end], **strong)
    axes.plot([left - 1.2, left + end], [top + length - 0.05] * 2, **strong)
    names = ("noised row xt", "clean row x0")
    for half, name in enumerate(names):
        middle = half * length + length / 2
        axes.text(left + middle, 2.0, name, **bold)
        axes.text(2.2, top + middle, name, rotation=90, **bold)
        for b in range(length // size):
            place = half * length + b * size + size / 2
            axes.text(left + place, 3.3, f"block {b}", ha="center", **plain)
            axes.text(left - 0.5, top + place, f"block {b}", ha="right", **plain)
    axes.text(left + length, 0.8, "keys", **faint)
    axes.text(0.9, top + length, "queries", rotation=90, **faint)


def blocks() -> Figure:
    """A row at three block sizes: where the model is autoregressive and where it diffuses."""
    figure, axes = blank(7.6, 3.4, 15.6, 7.0)
    words = "the old house stood by the river and".split()
    rows = (
        (1, "S = 1", "token by token"),
        (4, "S = 4", "block diffusion"),
        (8, "S = L", "masked diffusion"),
    )
    for index, (size, name, kind) in enumerate(rows):
        y = 1.2 + 2.1 * index
        axes.text(0.2, y - 0.25, name, fontweight="bold", va="center")
        axes.text(0.2, y + 0.3, kind, va="center", fontsize=8.5, color=FAINT)
        gap = 0.35
        for at, word in enumerate(words):
            b = at // size
            x = 3.1 + at * 1.2 + b * gap
            box(axes, x, y, 1.2, (BLUE, ORANGE)[b % 2], word, fontsize=9)
        count = len(words) // size
        for b in range(1, count):
            start = 3.1 + b * size * 1.2 + (b - 1) * gap
            axes.add_patch(
                FancyArrowPatch(
                    (start - 0.1, y - 0.45),
                    (start + gap + 0.1, y - 0.45),
                    connectionstyle="arc3,rad=-0.6",
                    arrowstyle="-|>",
                    mutation_scale=8,
                    color=INK,
                    linewidth=1,
                )
            )
    axes.text(
        3.1,
        6.7,
        "arrows: each block is drawn given all blocks before it; "
        "inside a block, tokens in any order",
        fontsize=8.5,
        color=FAINT,
        va="center",
    )
    return figure


def schedules() -> Figure:
    """p(t) and w(t) of the seven schedules, computed by the package."""
    from bd3lm.data import Schedule

    shown = {
        "loglinear": (Schedule("loglinear"), INK, "-"),
        "square": (Schedule("square"), BLUE, "-."),
        "square_root": (Schedule("square_root"), SKY, ":"),
        "logarithmic": (Schedule("logarithmic"), GREEN, "--"),
        "cosine": (Schedule("cosine"), VERMILION, (0, (7, 2, 1.5, 2, 1.5, 2))),
        "gaussian": (Schedule("gaussian", mu=0.5, sigma=0.2), PURPLE, (0, (9, 3))),
        "bimodal_gaussian": (
            Schedule("bimodal_gaussian", mu=0.3, sigma=0.2, mu2=0.8, sigma2=0.2, mixture=0.6),
            ORANGE,
            (0, (3, 1)),
        ),
    }
    t = np.linspace(1e-3, 1.0, 400)
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (schedule, color, line) in shown.items():
        left.plot(t, schedule.mask_prob(t), color=color, linestyle=line, label=name)
        right.plot(t, schedule.loss_weight(t), color=color, linestyle=line, label=name)
    left.set(xlabel="level t", ylabel="mask probability p(t)", xlim=(0, 1), ylim=(0, 1))
    right.set(xlabel="level t", ylabel="loss weight w(t)", xlim=(0, 1), ylim=(0.3, 100))
    right.set_yscale("log")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5
    )
    return figure


def estimators() -> Figure:
    """Masked tokens of a block of four, and the weight of each, under two estimators."""
    n = 4
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    t = np.linspace(1e-3, 1, 20_001)
    drawn = [np.mean(math.comb(n, k) * t**k * (1 - t) ** (n - k)) for k in range(n + 1)]
    place = np.arange(n + 1)
    left.bar(place - 0.2, drawn, 0.38, color=ORANGE, label="bernoulli, loglinear")
    left.bar(place + 0.2, [0, *[1 / n] * n], 0.38, color=BLUE, label="count, uniform q")
    left.set(xlabel="masked tokens k of S = 4", ylabel="share of blocks", ylim=(0, 0.33))
    left.legend(fontsize=8.5, loc="upper right", ncols=2, columnspacing=1)
    rng = np.random.default_rng(1)
    for k in range(1, n + 1):
        level = rng.beta(k + 1, n - k + 1, 150).clip(1e-3, 1)
        x = k - 0.2 + rng.uniform(-0.12, 0.12, 150)
        right.plot(x, 1 / level, ".", color=ORANGE, markersize=2.5, alpha=0.6)
        right.plot([k + 0.08, k + 0.36], [n / k] * 2, color=BLUE, linewidth=3)
    right.set(
        xlabel="masked tokens k", ylabel="weight of each masked token", xticks=range(1, n + 1)
    )
    right.set_yscale("log")
    return figure


def first_hitting() -> Figure:
    """Levels at which four positions are revealed: one at a time, or those between grid points."""
    levels = {"river": 0.89, "the": 0.78, "by": 0.41, "and": 0.14}
    words = ["by", "the", "river", "and"]
    figure, axes = blank(7.6, 4.3, 15.6, 8.8)
    left, right = 2.6, 14.6

    def at(level: float) -> float:
        return right - (right - left) * level

    axes.annotate(
        "",
        (right + 0.3, 1.15),
        (left - 0.2, 1.15),
        arrowprops={"arrowstyle": "-|>", "color": FAINT, "linewidth": 1},
    )
    axes.text(left, 0.6, "t = 1: all masked", ha="left", va="center", fontsize=9)
    axes.text(right, 0.6, "t = 0: clean", ha="right", va="center", fontsize=9)
    for index, word in enumerate(words):
        y = 2.1 + index
        level = levels[word]
        axes.text(0.2, y, f"position {index}", va="center", fontsize=9)
        axes.plot([at(1), at(level)], [y, y], color=FAINT, linewidth=5, alpha=0.45)
        axes.plot([at(level), at(0)], [y, y], color=BLUE, linewidth=5)
        axes.plot([at(level)] * 2, [1.15, y], color=INK, linewidth=0.8, linestyle=":")
        axes.text(
            at(level) + 0.2, y - 0.36, word, va="center", fontsize=9, fontweight="bold", color=BLUE
        )
    order = sorted(levels, key=lambda w: -levels[w])
    axes.text(0.2, 6.35, "first hitting", va="center", fontweight="bold", fontsize=9)
    for number, word in enumerate(order, 1):
        x = at(levels[word])
        axes.plot(x, 6.35, "o", color=ORANGE, markersize=11)
        axes.text(x, 6.35, str(number), ha="center", va="center", fontsize=8, color="#1f2328")
    axes.text(0.2, 7.55, "ancestral", va="center", fontweight="bold", fontsize=9)
    axes.text(0.2, 8.05, "N = 4 steps", va="center", fontsize=8.5, color=FAINT)
    for step in range(4):
        start, end = 1 - step / 4, 1 - (step + 1) / 4
        found = [w for w in order if end <= levels[w] < start]
        color = ORANGE if found else FAINT
        text = " ".join(found) if found else "no token: no forward"
        width = at(end) - at(start)
        box(axes, at(start), 7.75, width, color, text, fontsize=8.5, height=0.75)
    return figure


# --- a recorded sample ---------------------------------------------------------------------------


def record(checkpoint: str) -> None:
    """Draw one row and store the tokens of each forward.

    The row is the first that has no break of a line in it; nothing else is chosen.
    """
    from bd3lm.checkpoint import load_checkpoint
    from bd3lm.config import SampleConfig
    from bd3lm.sample import Sampler

    loaded = load_checkpoint(checkpoint)
    tokenizer, size = loaded.tokenizer, loaded.config.block
    sampler = Sampler.from_checkpoint(loaded)
    prompt = "The old house"
    ids = tokenizer.encode(prompt)
    for number in range(200):
        steps: list[list[str | None]] = []
        cfg = SampleConfig(length=4 * size, top_p=0.8)
        for event in sampler.stream(cfg, [ids], first=number, every_step=True):
            block = next(iter(event.blocks.values()))
            seen = [None if i == sampler.mask_id else tokenizer.decode([i]) for i in block]
            if not event.complete:
                steps.append([event.start, *seen])  # type: ignore[list-item]
        words = [w for step in steps for w in step[1:] if w is not None]
        if all("\n" not in w and w.isprintable() for w in words):
            break
    found = {
        "prompt": prompt,
        "given": [tokenizer.decode([i]) for i in ids],
        "row": number,
        "block_size": size,
        "steps": steps,
    }
    TRACE.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def denoising() -> Figure:
    """A sample of the demo's model: a line for each forward."""
    trace = json.loads(TRACE.read_text(encoding="utf-8"))
    across, down = denoising_size(trace, trace["steps"])
    figure, axes = blank(8.8, 0.42 + 0.31 * len(trace["steps"]), across, down)
    draw_denoising(axes, trace, trace["steps"])
    return figure


WORD, GAP, MARGIN = 1.7, 0.3, 2.6
"""Width of a token, space between blocks, and width of the labels."""


def denoising_size(trace: dict[str, Any], lines: list[Any]) -> tuple[float, float]:
    """Units that :func:`draw_denoising` needs."""
    size = trace["block_size"]
    count = lines[-1][0] // size + 1
    return MARGIN + count * (size * WORD + GAP) + 0.2, len(lines) + 1.4


def draw_denoising(axes: Axes, trace: dict[str, Any], lines: list[Any]) -> None:
    """Draw a line for each forward: prompt, written, revealed and hidden tokens."""
    size, prompt = trace["block_size"], ["", *trace["given"]]
    starts = range(0, lines[-1][0] + size, size)
    written: dict[int, str] = {}
    for line, (start, *tokens) in enumerate(lines):
        y = line + 1.2
        axes.text(0.2, y, f"forward {line + 1}", va="center", fontsize=8, color=FAINT)
        seen = {start + i: word for i, word in enumerate(tokens) if word is not None}
        for at in range(len(starts) * size):
            x = MARGIN + at // size * (size * WORD + GAP) + at % size * WORD
            if at == 0:
                box(axes, x, y, WORD, FAINT, "BOS", fontsize=7, color=FAINT, alpha=0.1)
            elif at < len(prompt):
                box(axes, x, y, WORD, GREEN, shown(prompt[at]), fontsize=7.2, alpha=0.2)
            elif at in written:
                box(axes, x, y, WORD, BLUE, shown(written[at]), fontsize=7.2, alpha=0.2)
            elif at in seen:
                box(axes, x, y, WORD, ORANGE, shown(seen[at]), fontsize=7.2, alpha=0.55)
            else:
                current = at // size == start // size
                box(axes, x, y, WORD, FAINT, "", alpha=0.35 if current else 0.1)
        written |= seen
    for at in starts:
        x = MARGIN + at // size * (size * WORD + GAP) + size * WORD / 2
        axes.text(x, 0.35, f"block {at // size}", ha="center", va="center", fontsize=8, color=FAINT)


def shown(text: str) -> str:
    """A token as it is written in a cell."""
    text = text.strip()
    return text if len(text) <= 9 else text[:8] + "…"


PICTURES: dict[str, Callable[[], Figure]] = {
    "overview": overview,
    "mask": mask,
    "blocks": blocks,
    "denoising": denoising,
    "schedules": schedules,
    "estimators": estimators,
    "first_hitting": first_hitting,
}


def main(arguments: list[str], folder: Path = IMAGES) -> None:
    """Record a sample with ``--record``, then draw everything."""
    if arguments:
        option, checkpoint = arguments
        assert option == "--record"
        record(checkpoint)
    with mpl.rc_context(STYLE):
        for name, draw in PICTURES.items():
            save(draw(), folder / f"{name}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
