"""``bd3lm compare``: several runs in one table and one picture."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bd3lm.cli.common import PlainConsole, check_exists, parse, run
from bd3lm.config import check
from bd3lm.errors import FormatError, MissingPackageError

COLUMNS = {
    "system": "system",
    "block_size": "S",
    "seq_len": "L",
    "parameters": "parameters",
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "seconds",
    "loss": "loss",
    "val_nelbo": "NELBO",
    "val_ppl": "PPL",
    "val_bpb": "bits/byte",
}
"""Fields of summary.json and metrics.jsonl, and their headers."""


@dataclass(frozen=True)
class CompareArgs:
    """Compare training runs: results in a table, loss curves in a picture.

    A run that is still training, or was stopped, is compared at its last logged step.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs."""
    out: Path = Path("compare.png")
    """Picture to write: .png, .svg or .pdf. An existing file is replaced only with --force."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the picture if it exists."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object a run and nothing else."""

    def __post_init__(self) -> None:
        check(len(self.runs) >= 1, "runs", None, "at least one directory")
        endings = (".png", ".svg", ".pdf")
        check(self.out.suffix in endings, "out", self.out, "a .png, .svg or .pdf file")
        check(self.force or not self.out.exists(), "out", self.out, "a new file, without --force")


def main(argv: list[str] | None = None, prog: str = "bd3lm compare") -> None:
    """Entry point of ``bd3lm compare``."""
    run(lambda: compare(parse(CompareArgs, prog, argv)))


def compare(args: CompareArgs) -> None:
    """Read, print, draw."""
    from bd3lm.plots import plot_runs, save
    from bd3lm.training import read_metrics

    console = PlainConsole(stderr=args.json)
    found: dict[str, list[dict[str, Any]]] = {}
    records = []
    for path in args.runs:
        check_exists(path)
        if not (path / "metrics.jsonl").is_file():
            raise FormatError(f"{path} is not a run: it has no metrics.jsonl")
        found[str(path)] = read_metrics(path / "metrics.jsonl")
        records.append({"run": str(path)} | _result(path, found[str(path)]))
    if args.json:
        sys.stdout.writelines(json.dumps(record) + "\n" for record in records)
    else:
        for line in _table(records):
            console.print(line)
    try:
        title = f"{len(found)} runs" if len(found) > 1 else next(iter(found))
        save(plot_runs(found, title), args.out)
        console.print(f"wrote {args.out}")
    except MissingPackageError as error:
        console.print(f"no picture: {error}")


def _result(path: Path, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Last values of a run: of its summary, else of its log and settings."""
    last: dict[str, Any] = {}
    for line in metrics:
        last |= line
    result = {"loss": last.get("loss"), "steps": last.get("step"), "seconds": last.get("seconds")}
    result |= {name: last.get(name) for name in ("val_nelbo", "val_ppl", "val_bpb")}
    settings = _json(path / "config.json")
    result |= {name: settings.get(name) for name in ("system", "block_size", "seq_len")}
    summary = _json(path / "summary.json")
    return result | {name: summary[name] for name in COLUMNS if name in summary}


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is not there or holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _table(records: list[dict[str, Any]]) -> list[str]:
    """Rows of aligned columns; a column that no run has is left out."""
    names = [n for n in COLUMNS if any(record.get(n) is not None for record in records)]
    rows = [["run", *(COLUMNS[n] for n in names)]]
    rows += [[r["run"], *(_cell(r.get(n)) for n in names)] for r in records]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
