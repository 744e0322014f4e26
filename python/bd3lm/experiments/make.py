"""From names of tables to files: run what is missing, then write Markdown, JSON and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bd3lm.config import check
from bd3lm.data import load_tokenizer
from bd3lm.errors import ConfigError
from bd3lm.experiments.corpora import Texts
from bd3lm.experiments.formulas import FORMULAS
from bd3lm.experiments.render import figure, to_json, to_markdown
from bd3lm.experiments.runner import Events, Sweep
from bd3lm.experiments.scale import Corpora, scale_named
from bd3lm.experiments.spec import Table
from bd3lm.experiments.tables import TABLES, Recipes
from bd3lm.files import write_json, write_text
from bd3lm.report.plots import plot_beside, plot_lines, plot_panels, plot_points


def make_tables(
    names: Sequence[str],
    scale: str,
    out: Path,
    corpora: Corpora,
    *,
    tokenizer: str,
    seeds: int | None,
    evaluator: str | None,
    events: Events,
) -> list[tuple[str, str]]:
    """Make the named tables below ``out``; returns each one's name and Markdown file.

    Args:
        names: of :data:`TABLES`, or ``all``.
        scale: smoke, cpu or full.
        out: directory.
        corpora: the texts.
        tokenizer: of all of them.
        seeds: 1..seeds for every table; None: the scale's own choice.
        evaluator: causal language model of table 7, as ``bd3lm-judge`` takes it; None: no Gen. PPL.
        events: told what happens.

    Raises:
        ConfigError: an unknown table, scale or role, before anything is run.
        Bd3lmError: a run that cannot be made; what was finished stays.
    """
    check(seeds is None or seeds >= 1, "seeds", seeds, "at least 1")
    wanted = chosen(names)
    recipes = Recipes(scale_named(scale), evaluator, load_tokenizer(tokenizer).vocab_size)
    tables = [TABLES[name](recipes) for name in wanted if name in TABLES]
    if seeds is not None:
        tables = [replace(table, seeds=tuple(range(1, seeds + 1))) for table in tables]
    sweep = Sweep(out, Texts(corpora, tokenizer, out / "data"))
    if tables:
        sweep.make(tables, events)
    with sweep.claim("tables"):  # another sweep may end at the same moment
        written = [(name, str(write_formula(out, name))) for name in wanted if name in FORMULAS]
        written += [(table.name, str(write_table(sweep, table))) for table in tables]
    return sorted(written, key=lambda entry: wanted.index(entry[0]))


def chosen(names: Sequence[str]) -> list[str]:
    """Names of tables, ``all`` spelled out.

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
    if table.drawing == "curves":
        _draw_curves(sweep, table, picture)
        return file
    if table.drawing == "scatter":
        across, up = table.columns[:2]
        points = {
            " ".join(row.label): (
                figure(sweep, table, row.cells[across]).mean,
                figure(sweep, table, row.cells[up]).mean,
            )
            for row in table.rows
        }
        plot_points(points, picture, (table.title, across, up))
        return file
    column = table.columns[0]
    rows = [row for row in table.rows if column in row.cells]
    figures = [figure(sweep, table, row.cells[column]) for row in rows]
    plot_beside(
        [" · ".join(row.label) for row in rows],
        [f.mean for f in figures],
        [f.error for f in figures],
        [f.paper for f in figures],
        picture,
        (table.title, column),
    )
    return file


def _draw_curves(sweep: Sweep, table: Table, picture: Path) -> None:
    """Training curves of the first seed."""
    lines, steps = {}, []
    for row in table.rows:
        cell = next(iter(row.cells.values()))
        record = sweep.record(cell.run.seeded(table.seeds[0]), cell.measure)
        if record is not None:
            steps = record["values"]["steps"]
            lines[" · ".join(row.label)] = record["values"]["loss"]
    plot_lines(steps, lines, picture, (table.title, "step", "nats per token"))


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
    plot_panels(list(made.x), panels, picture, (made.title, "t"), made.band)
    file = folder / f"{name}.md"
    write_text(file, made.markdown)
    return file
