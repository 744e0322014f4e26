"""``bd3lm-paper``: the paper's tables and figures, made again."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bd3lm.cli.common import run
from bd3lm.cli.summary import facts
from bd3lm_paper import Corpora, Run, ScaleName, make_tables
from bd3lm_paper.spec import Measure


@dataclass(frozen=True)
class PaperArgs:
    """Train what the paper's tables compare, measure it, and write the paper's figures beside ours.

    Every run and every measurement is made once and kept in OUT, named by what made it: a sweep
    that was stopped goes on where it was when the same command is given again. The command may run
    several times at once: small models are best served by one process a core, each started with
    OMP_NUM_THREADS=1.
    """

    tables: tyro.conf.Positional[tuple[str, ...]]
    """table1 … table13, figure1, figure2, combined, budgets, speed, or all."""
    out: Path
    """Directory of runs, measurements, tables and pictures."""
    scale: ScaleName = "cpu"
    """smoke: seconds a table, to see that it runs; cpu: small models, an hour or so on two cores;
    full: the paper's sizes."""
    seeds: int | None = None
    """Seeds of every table. None: as many as the scale has, more where rows compete closely."""
    corpus: tyro.conf.UseAppendAction[dict[str, str]] = field(default_factory=dict)
    """Text of a role, may be given for several: lm1b and owt to train on, zero_lm1b, lambada and
    wikitext to score; what --data of bd3lm-train takes. What is missing: at full scale the
    paper's data sets from the hub, else the English text shipped to train on and nothing to
    score."""
    tokenizer: tyro.conf.UseAppendAction[dict[str, str]] = field(default_factory=dict)
    """Tokenizer of a role, may be given for several: of lm1b, and of owt with all that is scored:
    default, a file, a folder or a hub name. What is missing: at full scale bert-base-uncased and
    gpt2, else the default."""
    evaluator: str | None = None
    """Causal language model that judges samples (table 7, speed): what bd3lm-judge takes. None:
    gpt2-large at full scale, else none and no Gen. PPL."""
    page: Path | None = None
    """Markdown page to put the tables into, between <!-- table1 --> and <!-- /table1 -->."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``bd3lm-paper``."""
    run(lambda: paper(tyro.cli(PaperArgs, prog="bd3lm-paper", args=argv)))


def paper(args: PaperArgs) -> None:
    """Plan, run, write."""
    console = Console()
    with Watch(console) as watch:
        written = make_tables(
            args.tables,
            args.scale,
            args.out,
            Corpora(args.corpus, args.tokenizer),
            seeds=args.seeds,
            evaluator=args.evaluator,
            page=args.page,
            events=watch,
        )
    facts(console, f"Made {len(written)} tables", dict(written))


class Watch:
    """One bar over all training steps and one over all measurements, with time left."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[now]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not sys.stdout.isatty())
        self._console = console
        self._train = self._measure = TaskID(0)

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def planned(self, steps: int, measurements: int) -> None:
        """What is left to do."""
        self._console.print(f"{steps:,} training steps and {measurements} measurements to make")
        self._train = self._progress.add_task("training", total=steps, now="")
        self._measure = self._progress.add_task("measuring", total=measurements, now="")

    def training(self, run: Run, steps: int) -> None:
        """After a step, or when another sweep has trained a run."""
        self._progress.update(self._train, advance=steps, now=run.label)

    def measured(self, run: Run, measure: Measure, seconds: float) -> None:
        """After a measurement."""
        self._progress.update(self._measure, advance=1, now=measure.kind)
        if not sys.stdout.isatty():
            self._console.print(f"{run.label}: {measure.kind} in {seconds:.1f} s")
