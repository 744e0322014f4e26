"""``bd3lm paper``: tables and figures of the BD3-LM paper and its reproduction, made again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bd3lm.cli.common import PlainConsole, parse, run
from bd3lm.config import check_whole

if TYPE_CHECKING:
    from bd3lm_paper import Run
    from bd3lm_paper.spec import Measure


@dataclass(frozen=True)
class PaperArgs:
    """Make the tables and figures of the BD3-LM paper's reproduction again.

    The original is Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and
    Diffusion Language Models" (ICLR 2025, arXiv 2503.09573). The tables are those of its
    reproduction by Kordas et al., "Reproduction Results and Two Practical Extensions". Published
    figures are shown in columns of their own.

    Every run and every measurement is made once and kept in OUT under a name that depends on its
    settings: the same command again continues a sweep that was stopped. The command may run several
    times at once. Small models are best served by one process a core, each started with
    OMP_NUM_THREADS=1.
    """

    tables: tyro.conf.Positional[tuple[str, ...]]
    """table1 … table13, figure1, figure2, combined, budgets, speed, or all."""
    out: Path
    """Directory of runs, measurements, tables and pictures."""
    scale: Literal["smoke", "cpu", "full"] = "cpu"
    """smoke: seconds a table, to see that it runs; cpu: small models, about an hour for all
    tables on two cores; full: the sizes of the reproduction."""
    seeds: int | None = None
    """Seeds of every table. None: as many as the scale has, more where rows are close."""
    corpus: tyro.conf.UseAppendAction[dict[str, str]] = field(default_factory=dict)
    """Text of a role, may be given for several: lm1b and owt to train on, zero_lm1b, lambada and
    wikitext to score; as for --data of bd3lm-train. A role without text has, at full scale, the
    reproduction's data set from the hub; otherwise the shipped English text to train on and
    nothing to score."""
    tokenizer: tyro.conf.UseAppendAction[dict[str, str]] = field(default_factory=dict)
    """Tokenizer of a role, may be given for several: of lm1b, and of owt with all that is scored:
    default, a file, a folder or a hub name. A role without one has, at full scale,
    bert-base-uncased and gpt2; otherwise the default."""
    evaluator: str | None = None
    """Causal language model that judges samples (table 7, speed), as for bd3lm-judge. None:
    gpt2-large at full scale; otherwise none, and no Gen. PPL."""
    page: Path | None = None
    """Markdown page to put the tables into, between <!-- table1 --> and <!-- /table1 -->."""


def main(argv: list[str] | None = None, prog: str = "bd3lm-paper") -> None:
    """Entry point of ``bd3lm-paper`` and ``bd3lm paper``."""
    run(lambda: paper(parse(PaperArgs, prog, argv)))


def paper(args: PaperArgs) -> None:
    """Plan, run, write."""
    if args.seeds is not None:
        check_whole("seeds", args.seeds, 1, 1000)

    from bd3lm.cli.summary import facts
    from bd3lm_paper import Corpora, make_tables

    console = PlainConsole()
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

    def __init__(self, console: PlainConsole) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[now]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._console = console
        self._train = self._measure = TaskID(0)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def planned(self, steps: int, measurements: int) -> None:
        """Print the remaining work, and start the bars."""
        self._progress.start()
        self._console.print(f"{steps:,} training steps and {measurements} measurements to make")
        self._train = self._progress.add_task("training", total=steps, now="")
        self._measure = self._progress.add_task("measuring", total=measurements, now="")

    def training(self, run: Run, steps: int) -> None:
        """Advance after a step, or after a run of another sweep."""
        self._progress.update(self._train, advance=steps, now=run.label)

    def measured(self, run: Run, measure: Measure, seconds: float) -> None:
        """Advance after a measurement."""
        self._progress.update(self._measure, advance=1, now=measure.kind)
        if not self._console.is_terminal:
            self._console.print(f"{run.label}: {measure.kind} in {seconds:.1f} s")
