"""Figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: never look for a display

from matplotlib import pyplot as plt


def plot_lines(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], file: Path, labels: tuple[str, ...]
) -> None:
    """Curves over a common axis, on a logarithmic scale where they span decades.

    Args:
        x: the common axis.
        lines: curves by name.
        file: the PNG to write.
        labels: title, horizontal and vertical axis.
    """
    plot_panels(x, {labels[2]: lines}, file, labels[:2])


def plot_panels(
    x: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    file: Path,
    labels: tuple[str, ...],
    band: tuple[float, float, str] | None = None,
) -> None:
    """Panels side by side with the same curves' names, each as :func:`plot_lines` draws it.

    Args:
        x: the common axis.
        panels: curves by name, by what the vertical axis shows.
        file: the PNG to write.
        labels: title and horizontal axis.
        band: part of the horizontal axis to shade, and what it is.
    """
    figure, row = plt.subplots(
        1, len(panels), figsize=(7 * len(panels), 4), layout="constrained", squeeze=False
    )
    for axes, (name, lines) in zip(row[0], panels.items(), strict=True):
        for curve, y in lines.items():
            axes.plot(x, y, linewidth=1.5, label=curve)
        values = [v for y in lines.values() for v in y if v > 0]
        if values and max(values) > max(1.0, 100 * min(values)):  # not of probabilities
            axes.set_yscale("log")
        if band is not None:
            axes.axvspan(band[0], band[1], color="0.5", alpha=0.15, label=band[2])
        axes.set(xlabel=labels[1], ylabel=name)
        axes.grid(alpha=0.3)
    row[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(labels[0])
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_points(
    points: Mapping[str, Sequence[float | None]], file: Path, title: str, columns: Sequence[str]
) -> None:
    """Named points: each further column over the first, a panel each.

    An axis that spans a factor of three is logarithmic. A missing figure leaves its point out, and
    a panel without points its place.

    Args:
        points: figures by name, one a column.
        file: the PNG to write.
        title: of the figure.
        columns: names of the axes, the horizontal one first.
    """
    seen = [[row[i] for row in points.values() if row[i] is not None] for i in range(len(columns))]
    panels = [i for i in range(1, len(columns)) if seen[i]]
    width = 4.5 * len(panels) + 2.5
    figure, grid = plt.subplots(
        1, max(len(panels), 1), figsize=(width, 4.5), layout="constrained", squeeze=False
    )
    for axes, column in zip(grid[0], panels, strict=False):
        for index, (name, row) in enumerate(points.items()):
            if row[0] is not None and row[column] is not None:
                axes.plot(row[0], row[column], "os^vDPX*"[index % 8], markersize=7, label=name)
        axes.set(xlabel=columns[0], ylabel=columns[column])
        axes.set(xscale=_scale(seen[0]), yscale=_scale(seen[column]))
        axes.grid(alpha=0.3, which="both")
    grid[0][-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _scale(values: Sequence[Any]) -> str:
    return "log" if min(values) > 0 and max(values) > 3 * min(values) else "linear"


def plot_beside(
    rows: Sequence[str],
    ours: Sequence[float | None],
    errors: Sequence[float | None],
    paper: Sequence[float | None],
    file: Path,
    labels: tuple[str, str],
) -> None:
    """A column of a table as bars, the paper's beside ours, each on its own scale.

    Args:
        rows: names, from top to bottom.
        ours: figures; None leaves a gap.
        errors: standard errors; None draws none.
        paper: the paper's figures.
        file: the PNG to write.
        labels: title and name of the column.
    """
    panels = [("ours", ours, errors)]
    if any(value is not None for value in paper):
        panels.append(("the paper's", paper, [None] * len(rows)))
    height = 1.2 + 0.3 * len(rows)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), height), sharey=True, layout="constrained"
    )
    places = list(range(len(rows)))
    for panel, (name, values, spread) in zip(np.atleast_1d(axes), panels, strict=True):
        shown = [0.0 if value is None else value for value in values]
        panel.barh(places, shown, xerr=[e or 0.0 for e in spread], color="#4477aa", height=0.7)
        panel.set(yticks=places, yticklabels=rows, xlabel=f"{labels[1]}, {name}")
        panel.grid(axis="x", alpha=0.3)
    np.atleast_1d(axes)[0].invert_yaxis()
    figure.suptitle(labels[0], fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_loss(metrics: list[dict[str, Any]], file: Path, title: str) -> None:
    """Training loss and validation NELBO, in nats a token, over steps.

    Args:
        metrics: lines of ``metrics.jsonl``.
        file: the PNG to write.
        title: of the figure.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    loss = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    valid = [(m["step"], m["val_nelbo"]) for m in metrics if m.get("val_nelbo") is not None]
    if loss:
        axes.plot(*zip(*loss, strict=True), color="#4477aa", linewidth=1, label="training loss")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color="#cc6677", label="validation NELBO")
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
