"""Figures of runs and tables, drawn without pyplot and so without touching the user's settings.

matplotlib comes with the extra ``plots`` and is imported when a figure is made. Every function
returns a ``matplotlib.figure.Figure``, which a notebook shows; :func:`save` writes it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3lm.extras import require
from bd3lm.files import storage_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, in an order in which neighbours differ in brightness too."""
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1)))
MARKERS = "os^vDPX"
"""Colour, dashes and marker change together, so that none of them is needed alone."""
DPI = 120
LOG_RATIO = 3.0
"""An axis of points is logarithmic from this ratio of largest to smallest value on."""


def save(figure: Figure, file: Path | str) -> None:
    """Write a figure as PNG, SVG or PDF, by the ending of the file's name.

    Raises:
        StorageError: the file cannot be written.
    """
    with storage_errors(Path(file)):
        figure.savefig(file, dpi=DPI)


def plot_loss(metrics: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Training loss and validation NELBO of one run, in nats a token, over steps.

    Args:
        metrics: lines of ``metrics.jsonl``.
        title: of the figure.
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    loss, valid = _series(metrics, "loss"), _series(metrics, "val_nelbo")
    if loss[0]:
        axes.plot(*loss, color=COLOURS[0], linewidth=1, label="training loss")
    if valid[0]:
        axes.plot(*valid, "o-", color=COLOURS[1], label="validation NELBO")
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    _engineering(axes.xaxis, loss[0] + valid[0])
    _finish(axes, legend=bool(loss[0] or valid[0]))
    return figure


def plot_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> Figure:
    """Training loss and validation NELBO of several runs, a panel each.

    Args:
        runs: lines of ``metrics.jsonl`` by the name of a run.
        title: of the figure.
    """
    figure = _figure(12, 4.2)
    panels = figure.subplots(1, 2, sharex=True)
    for axes, field, name in zip(
        panels, ("loss", "val_nelbo"), ("training loss", "validation NELBO"), strict=True
    ):
        steps: list[float] = []
        for index, (label, metrics) in enumerate(runs.items()):
            x, y = _series(metrics, field)
            steps += x
            # A run that was scored once is a point; a curve of losses needs no markers.
            marker = MARKERS[index % len(MARKERS)] if field == "val_nelbo" else None
            axes.plot(x, y, label=label, marker=marker, **_line(index))
        axes.set(xlabel="step", ylabel=f"{name}, nats per token")
        _engineering(axes.xaxis, steps)
        _finish(axes)
    panels[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    return figure


def plot_lines(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], labels: tuple[str, str, str]
) -> Figure:
    """Curves over a common axis, logarithmic where they span two decades.

    Args:
        x: the common axis.
        lines: curves by name.
        labels: title, horizontal and vertical axis.
    """
    return plot_panels(x, {labels[2]: lines}, labels[:2])


def plot_panels(
    x: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    labels: tuple[str, str],
    band: tuple[float, float, str] | None = None,
) -> Figure:
    """Panels side by side, each with the same names of curves.

    Args:
        x: the common axis.
        panels: curves by name, by the label of the vertical axis.
        labels: title and horizontal axis.
        band: part of the horizontal axis to shade, and its name.
    """
    figure = _figure(7 * len(panels), 4)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, lines) in zip(row, panels.items(), strict=True):
        for index, (curve, y) in enumerate(lines.items()):
            axes.plot(x, y, label=curve, **_line(index))
        values = [v for y in lines.values() for v in y if v > 0]
        if values and max(values) > max(1.0, 100 * min(values)):  # not of probabilities
            axes.set_yscale("log")
        if band is not None:
            axes.axvspan(band[0], band[1], color="0.5", alpha=0.15, label=band[2])
        axes.set(xlabel=labels[1], ylabel=name)
        _engineering(axes.xaxis, x)
        _finish(axes)
    row[0].legend(frameon=False, fontsize=8)
    figure.suptitle(labels[0])
    return figure


def plot_points(
    points: Mapping[tuple[str, str], Sequence[float | None]], title: str, columns: Sequence[str]
) -> Figure:
    """Points of several groups: each further column over the first, a panel each.

    Points of a group share a colour and are joined; the marker tells their variant. A missing
    figure leaves its point out. A panel without points says so.

    Args:
        points: figures by group and variant, one a column.
        title: of the figure.
        columns: labels of the axes, the horizontal one first.
    """
    groups = list(dict.fromkeys(group for group, _ in points))
    variants = list(dict.fromkeys(variant for _, variant in points))
    figure = _figure(4.6 * (len(columns) - 1) + 2.6, 4.5)
    row = figure.subplots(1, len(columns) - 1, squeeze=False)[0]
    for axes, column in zip(row, range(1, len(columns)), strict=True):
        seen: tuple[list[float], list[float]] = ([], [])
        for index, group in enumerate(groups):
            chosen = {
                variant: (values[0], values[column])
                for (name, variant), values in points.items()
                if name == group
            }
            pairs = {v: (x, y) for v, (x, y) in chosen.items() if x is not None and y is not None}
            colour = COLOURS[index % len(COLOURS)]
            if pairs:
                axes.plot(*zip(*sorted(pairs.values()), strict=True), color=colour, linewidth=0.8)
            for variant, (x, y) in pairs.items():
                marker = MARKERS[variants.index(variant) % len(MARKERS)]
                label = f"{group}, {variant}" if variant else group
                axes.plot([x], [y], marker, color=colour, markersize=7, label=label)
                seen[0].append(x)
                seen[1].append(y)
        axes.set(xlabel=columns[0], ylabel=columns[column])
        if not seen[0]:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4")
        _scale(axes, "x", seen[0])
        _scale(axes, "y", seen[1])
        _finish(axes)
    handles, labels = max(
        (axes.get_legend_handles_labels() for axes in row), key=lambda h: len(h[0])
    )
    row[-1].legend(
        handles, labels, frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.suptitle(title, fontsize=10)
    return figure


def plot_dots(
    rows: Sequence[str],
    panels: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]],
    title: str,
) -> Figure:
    """A dot with an error bar for each row of a table, a panel for each source of figures.

    Each panel has its own scale, which does not begin at zero: the differences between rows are
    small against their values.

    Args:
        rows: names, from top to bottom.
        panels: figures and their standard errors, by the label of the axis; None draws nothing.
        title: of the figure.
    """
    figure = _figure(2.2 + 3.6 * len(panels), 1.3 + 0.28 * len(rows))
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = range(len(rows))
    for index, (axes, (label, (values, errors))) in enumerate(
        zip(row, panels.items(), strict=True)
    ):
        for place, value, error in zip(places, values, errors, strict=True):
            if value is not None:
                style = {"color": COLOURS[index], "marker": MARKERS[index], "capsize": 3}
                axes.errorbar([value], [place], xerr=[error or 0.0], **style)
        axes.set_yticks(places, labels=rows)
        axes.set_xlabel(label)
        axes.margins(x=0.08)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(5))
        _engineering(axes.xaxis, [v for v in values if v is not None])
        _finish(axes)
    figure.suptitle(title, fontsize=10)
    return figure


# --- parts of a figure ----------------------------------------------------------------------------


def _series(metrics: Sequence[Mapping[str, Any]], field: str) -> tuple[list[float], list[float]]:
    """Steps and values of one field."""
    pairs = [(m["step"], m[field]) for m in metrics if m.get(field) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _line(index: int) -> dict[str, Any]:
    """Style of the n-th curve. Dashes lie above solid lines, so that equal curves are both seen."""
    dashes = DASHES[index % len(DASHES)]
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": dashes,
        "linewidth": 1.5,
        "zorder": 2.0 if dashes == "-" else 2.1,
    }


def _finish(axes: Axes, *, legend: bool = False) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)


def _scale(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Make the x or y axis logarithmic where the values span it, with few ticks."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    if not values or min(values) <= 0 or max(values) <= LOG_RATIO * min(values):
        axis.set_major_locator(_ticker().MaxNLocator(5))
        return
    axes.set(**{f"{name}scale": "log"})
    decades = max(values) / min(values) > 100
    axis.set_major_locator(_ticker().LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 5.0)))
    plain = _ticker().FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(_ticker().EngFormatter(sep="") if max(values) >= 10_000 else plain)
    axis.set_minor_formatter(_ticker().NullFormatter())


def _engineering(axis: Axis, values: Sequence[float]) -> None:
    """10k and not 10000, so that large ticks do not run into each other."""
    if len(values) and max(values) >= 10_000:
        axis.set_major_formatter(_ticker().EngFormatter(sep=""))


def _figure(width: float, height: float) -> Figure:
    """A figure on a canvas of its own, inches."""
    return _figure_class()(figsize=(width, height), layout="constrained")


def _ticker() -> Any:
    return _import("matplotlib.ticker")


@cache
def _figure_class() -> type[Figure]:
    """A figure that a notebook shows without pyplot."""
    base: Any = _import("matplotlib.figure").Figure
    canvas: Any = _import("matplotlib.backends.backend_agg").FigureCanvasAgg

    class Shown(base):
        """A figure with an Agg canvas."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            canvas(self)

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=DPI)
            return buffer.getvalue()

    return Shown


def _import(name: str) -> Any:
    """Import a module of matplotlib under any MPLBACKEND.

    Notebooks set MPLBACKEND for the commands that they start, to a backend that the command's
    environment may not have. matplotlib then fails to import, although no backend is needed here.
    """
    if "matplotlib" not in sys.modules:
        backend = os.environ.pop("MPLBACKEND", None)
        try:
            matplotlib: Any = require("matplotlib", "plots", "a picture")
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
        if backend:  # the user's own figures are to be shown there
            with suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
    return require(name, "plots", "a picture")
