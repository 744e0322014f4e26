"""Tables as Markdown and JSON, with the published figures in columns of their own."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from bd3lm_paper.runner import Sweep
from bd3lm_paper.spec import Cell, Row, Table

REPRODUCTION = "Kordas et al."
"""Kordas et al., "Block Diffusion: … Reproduction Results and Two Practical Extensions", whose
tables are made again here."""
ORIGINAL = "Arriola et al."
"""Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language
Models", ICLR 2025, arXiv 2503.09573."""
SIZES = f"{ORIGINAL} trained larger models on far more text: compare rows, not columns."


@dataclass(frozen=True)
class Figure:
    """One number over the seeds it was measured with.

    Attributes:
        mean: over seeds; None where nothing was measured.
        error: standard error of that mean from the spread of the seeds; None with one seed.
        seeds: how many.
        paper: the figure of the reproduction.
        original: the figure of the original paper.
    """

    mean: float | None
    error: float | None
    seeds: int
    paper: float | None
    original: float | None = None


@dataclass(frozen=True)
class Difference:
    """Difference of two rows in nats a token, on the same text and seeds.

    Attributes:
        mean: negative is better.
        error: paired standard error, over seeds and rows of the text.
    """

    mean: float
    error: float


def figure(sweep: Sweep, table: Table, cell: Cell) -> Figure:
    """A cell's number over the table's seeds."""
    values = []
    for seed in table.seeds:
        record = sweep.record(cell.run.seeded(seed), cell.measure)
        value = None if record is None else record["values"].get(cell.field)
        if value is not None:
            values.append(float(value))
    if not values:
        return Figure(None, None, 0, cell.paper, cell.original)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Figure(statistics.fmean(values), error, len(values), cell.paper, cell.original)


def difference(sweep: Sweep, table: Table, row: Row) -> Difference | None:
    """NELBO of a row less that of its base, paired by seed and by row of the text.

    The seeds' differences are averaged for each row of the text; the error combines the spread
    over rows (the text) with the spread over seeds (the training), as independent sources.
    """
    if row.base is None or row.base == row.label:
        return None
    base = next((other for other in table.rows if other.label == row.base), None)
    column = table.columns[0]
    if base is None or column not in row.cells or column not in base.cells:
        return None
    by_seed = []
    for seed in table.seeds:
        pair = [
            sweep.record(cell.run.seeded(seed), cell.measure)
            for cell in (row.cells[column], base.cells[column])
        ]
        if any(r is None or "row_nats" not in r["values"] for r in pair):
            return None
        ours, theirs = (r["values"] for r in pair if r is not None)
        if ours["row_tokens"] != theirs["row_tokens"]:
            return None  # rows were cut differently: nothing to pair
        scored = sum(ours["row_tokens"])
        nats = [a - b for a, b in zip(ours["row_nats"], theirs["row_nats"], strict=True)]
        by_seed.append([len(nats) * x / scored for x in nats])
    rows = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    mean = statistics.fmean(rows)
    variance = statistics.variance(rows) / len(rows) if len(rows) > 1 else 0.0
    if len(by_seed) > 1:
        seeds = [statistics.fmean(values) for values in by_seed]
        variance += statistics.variance(seeds) / len(seeds)
    return Difference(mean, math.sqrt(variance))


def to_json(sweep: Sweep, table: Table) -> dict[str, Any]:
    """The table with every figure, for programs."""
    rows = []
    for row in table.rows:
        change = difference(sweep, table, row)
        rows.append(
            {
                "label": list(row.label),
                "cells": {
                    name: vars(figure(sweep, table, cell)) for name, cell in row.cells.items()
                },
                "nats_less_base": None if change is None else vars(change),
                "base": None if row.base is None else list(row.base),
            }
        )
    return {
        "name": table.name,
        "title": table.title,
        "columns": list(table.columns),
        "seeds": list(table.seeds),
        "rows": rows,
        "remark": table.remark,
    }


def to_markdown(sweep: Sweep, table: Table) -> str:
    """The table as Markdown: measured here (± standard error over seeds), then as published."""
    changes = [difference(sweep, table, row) for row in table.rows]
    paired = any(change is not None for change in changes)
    cells = {c: [row.cells[c] for row in table.rows if c in row.cells] for c in table.columns}
    has_paper = {c: any(cell.paper is not None for cell in cells[c]) for c in cells}
    has_original = {c: any(cell.original is not None for cell in cells[c]) for c in cells}
    header = list(table.labels)
    for column in table.columns:
        header.append(column)
        if has_paper[column]:
            header.append(f"{column}, {REPRODUCTION}")
        if has_original[column]:
            header.append(f"{column}, {ORIGINAL}")
    if paired:
        header.append("nats less base ± paired s.e.")
    lines = [f"### {_heading(table.name)}: {table.title}", ""]
    lines += [_line(header), _line(["---"] * len(header))]
    for row, change in zip(table.rows, changes, strict=True):
        texts = list(row.label)
        for column in table.columns:
            cell = row.cells.get(column)
            shown = Figure(None, None, 0, None) if cell is None else figure(sweep, table, cell)
            texts.append(_number(shown))
            if has_paper[column]:
                texts.append("" if shown.paper is None else f"{shown.paper:g}")
            if has_original[column]:
                texts.append("" if shown.original is None else f"{shown.original:g}")
        if paired:
            same = "base" if row.base == row.label else ""
            texts.append(same if change is None else f"{change.mean:+.4f} ± {change.error:.4f}")
        lines.append(_line(texts))
    seeds = len(table.seeds)
    note = f"{seeds} seeds; ± is the standard error over them." if seeds > 1 else "One seed."
    if any(has_original.values()):
        note += f" {SIZES}"
    lines += ["", note + (f" {table.remark}" if table.remark else ""), ""]
    return "\n".join(lines)


def _heading(name: str) -> str:
    for kind in ("table", "figure"):
        if name.startswith(kind):
            return f"{kind.capitalize()} {name.removeprefix(kind)}"
    return name.capitalize()


def _number(shown: Figure) -> str:
    if shown.mean is None:
        return "–"
    digits = f"{shown.mean:,.1f}" if abs(shown.mean) >= 100 else f"{shown.mean:.4g}"
    if shown.error is None:
        return digits
    return f"{digits} ± {shown.error:.2g}"


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"
