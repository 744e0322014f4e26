"""Make tables by name: run missing experiments, then write Markdown, JSON and pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bd3lm.config import check
from bd3lm.errors import ConfigError
from bd3lm.files import write_json, write_text
from bd3lm.plots import plot_dots, plot_lines, plot_panels, plot_points, save
from bd3lm_paper.corpora import Texts
from bd3lm_paper.formulas import FORMULAS
from bd3lm_paper.recipes import Recipes
from bd3lm_paper.render import REPRODUCTION, figure, to_json, to_markdown
from bd3lm_paper.runner import Events, Sweep
from bd3lm_paper.scale import Corpora, scale_named
from bd3lm_paper.spec import Table
from bd3lm_paper.tables import TABLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_tables(
    names: Sequence[str],
    scale: str,
    out: Path,
    corpora: Corpora,
    *,
    seeds: int | None,
    evaluator: str | None,
    page: Path | None,
    events: Events,
) -> list[tuple[str, str]]:
    """Make the named tables below ``out``; returns each one's name and Markdown file.

    Args:
        names: of :data:`TABLES`, or ``all``.
        scale: smoke, cpu or full.
        out: directory.
        corpora: texts and tokenizers that replace the scale's.
        seeds: 1..seeds for every table; None: the scale's own choice.
        evaluator: causal language model that judges samples, as ``bd3lm-judge`` takes it; None:
            the scale's.
        page: Markdown page to put the tables into (:func:`fill_page`), or None.
        events: receives progress.

    Raises:
        ConfigError: an unknown table, scale or role, or no such page, before anything is run.
        Bd3lmError: a run that cannot be made; finished ones stay.
    """
    check(seeds is None or seeds >= 1, "seeds", seeds, "at least 1")
    check(page is None or page.is_file(), "page", page, "a Markdown file that exists")
    wanted = chosen(names)
    sizes = scale_named(scale)
    sweep = Sweep(out, Texts(sizes.corpora.updated(corpora), out / "data"))
    tables: list[Table] = []
    if any(name in TABLES for name in wanted):
        recipes = Recipes(sizes, evaluator or sizes.evaluator, sweep.open_texts())
        made = [TABLES[name](recipes) for name in wanted if name in TABLES]
        tables = [replace(table, scale=scale) for table in made]
        if seeds is not None:
            tables = [replace(table, seeds=tuple(range(1, seeds + 1))) for table in tables]
        sweep.make(tables, events)
    with sweep.claim("tables"):  # another sweep may end at the same moment
        written = {name: write_formula(out, name) for name in wanted if name in FORMULAS}
        written |= {table.name: write_table(sweep, table) for table in tables}
        sweep.archive()
        if page is not None:
            fill_page(page, written)
    return [(name, str(written[name])) for name in wanted]


def fill_page(page: Path, written: Mapping[str, Path]) -> None:
    """Put tables and pictures into a page, between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    The rest of the page, which comments on the tables, is not changed.
    """
    text = page.read_text(encoding="utf-8")
    for name, file in written.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if found and closed:
            picture = os.path.relpath(file.with_suffix(".png"), page.parent)
            table = file.read_text(encoding="utf-8")
            text = f"{before}{start}{table}\n![{name}]({picture})\n{end}{after}"
    write_text(page, text)


def chosen(names: Sequence[str]) -> list[str]:
    """Resolve names of tables, ``all`` included.

    Raises:
        ConfigError: a name that is not there, or none.
    """
    known = [*TABLES, *FORMULAS]
    if "all" in names:
        return known
    allowed = f"one of {', '.join(known)} or all"
    if not names:
        raise ConfigError("table", None, allowed)
    for name in names:
        check(name in known, "table", name, allowed)
    return list(dict.fromkeys(names))


def write_table(sweep: Sweep, table: Table) -> Path:
    """Write a table's Markdown and JSON; returns the Markdown file."""
    folder = sweep.out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{table.name}.json", to_json(sweep, table))
    file = folder / f"{table.name}.md"
    write_text(file, to_markdown(sweep, table))
    picture = folder / f"{table.name}.png"
    draw = {"curves": _draw_curves, "scatter": _draw_points, "dots": _draw_dots}[table.drawing]
    save(draw(sweep, table), picture)
    return file


def _draw_points(sweep: Sweep, table: Table) -> Figure:
    """The second and third columns over the first."""
    columns = table.columns[:3]
    points = {
        (row.label[0], " ".join(row.label[1:])): [
            figure(sweep, table, row.cells[c]).mean for c in columns
        ]
        for row in table.rows
    }
    return plot_points(points, _titled(table), columns)


def _draw_dots(sweep: Sweep, table: Table) -> Figure:
    """The first column, and the figures of the reproduction on a scale of their own."""
    column = table.columns[0]
    rows = [row for row in table.rows if column in row.cells]
    figures = [figure(sweep, table, row.cells[column]) for row in rows]
    panels: dict[str, tuple[list[float | None], list[float | None]]] = {
        f"{column}, here": ([f.mean for f in figures], [f.error for f in figures])
    }
    if any(f.paper is not None for f in figures):
        panels[f"{column}, {REPRODUCTION}"] = ([f.paper for f in figures], [None] * len(rows))
    return plot_dots([" · ".join(row.label) for row in rows], panels, _titled(table))


def _titled(table: Table) -> str:
    """The title with the scale that a table was made at."""
    return f"{table.title} ({table.scale} scale)" if table.scale else table.title


def _draw_curves(sweep: Sweep, table: Table) -> Figure:
    """Training curves of the first seed."""
    lines, steps = {}, []
    for row in table.rows:
        cell = next(iter(row.cells.values()))
        record = sweep.record(cell.run.seeded(table.seeds[0]), cell.measure)
        if record is not None:
            steps = record["values"]["steps"]
            lines[" · ".join(row.label)] = record["values"]["loss"]
    return plot_lines(steps, lines, (_titled(table), "step", "nats per token"))


def write_formula(out: Path, name: str) -> Path:
    """Write a table of functions and its picture; returns the Markdown file."""
    folder = out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    made = FORMULAS[name]()
    panels = {
        axis: {key: list(values) for key, values in lines.items()}
        for axis, lines in made.panels.items()
    }
    picture = folder / f"{name}.png"
    save(plot_panels(list(made.x), panels, (made.title, "t"), made.band), picture)
    file = folder / f"{name}.md"
    write_text(file, made.markdown)
    return file
