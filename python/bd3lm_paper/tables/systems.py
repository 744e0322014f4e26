"""Tables of all systems: perplexities, zero-shot texts, equal budgets, training curves."""

from __future__ import annotations

from dataclasses import replace

from bd3lm.config.evaluate import MAX_MARGINAL_BLOCK
from bd3lm.model.flops import step_flops
from bd3lm_paper.measures import Autoregressive, Cost, Curve, Marginal, Perplexity, ZeroShot
from bd3lm_paper.recipes import CLIPS, Recipes, System, joint, six_models
from bd3lm_paper.spec import Cell, Row, Run, Table

GAP = "bound − exact, nats"
"""Column of :class:`Marginal`."""
JOINT = "BD3-LM S = 4, joint"
"""A causal clean stream and the next-token loss besides that of diffusion (docs/recipe.md)."""
AS_AR = f"{JOINT}, as AR"
"""The same checkpoint as an autoregressive model."""


def table1(r: Recipes) -> Table:
    """AR against BD3-LM at S = 1."""
    plain = r.scratch("bd3lm", "lm1b", (800,), block=1)
    tuned = r.scratch("bd3lm", "lm1b", (800,), block=1, clip=(1.0, 1.0))
    rows = [
        ("Autoregressive", r.scratch("ar", "lm1b", (800,)), 1893, 22.88),
        ("BD3-LM S = 1", plain, 2231, 25.56),
        ("BD3-LM S = 1, tuned schedule U[1, 1]", tuned, 2220, None),
    ]
    return Table(
        "table1",
        "Single-token generation: AR against BD3-LM with S = 1",
        ("model",),
        ("PPL",),
        tuple(
            Row((label,), {"PPL": r.perplexity(run, paper, original)}, base=(rows[1][0],))
            for label, run, paper, original in rows
        ),
        seeds=r.scale.close_seeds,
    )


def _comparison(
    r: Recipes,
    name: str,
    title: str,
    corpus: str,
    steps: tuple[int, int],
    papers: list[float | None],
    originals: list[float | None],
) -> Table:
    rows = []
    for (label, run, paper), original in zip(
        six_models(r, corpus, steps, papers), originals, strict=True
    ):
        cells = {"PPL": r.perplexity(run, paper, original)}
        if run.config.system == "bd3lm" and run.config.block <= MAX_MARGINAL_BLOCK:
            cells[GAP] = Cell(run, Marginal(rows=r.scale.valid_rows), "gap", None)
        rows.append(Row((label,), cells, base=("MDLM",)))
    rows += _joint_rows(r, joint(r.tuned(corpus, 4, steps, clip=CLIPS[4])))
    return Table(
        name,
        title,
        ("model",),
        ("PPL", GAP),
        tuple(rows),
        remark="PPL is that of the bound, and for AR exact. The exact likelihood is that of first "
        "hitting, from the same forwards, and is computed up to S = 8.",
    )


def _joint_rows(r: Recipes, run: Run) -> list[Row]:
    """One checkpoint as the two models that it is."""
    gap = Cell(run, Marginal(rows=r.scale.valid_rows), "gap")
    return [
        Row((JOINT,), {"PPL": r.perplexity(run), GAP: gap}, base=("MDLM",)),
        Row((AS_AR,), {"PPL": as_ar(r.perplexity(run))}, base=("MDLM",)),
    ]


def as_ar(cell: Cell) -> Cell:
    """The perplexity of the same run as an autoregressive model."""
    assert isinstance(cell.measure, Perplexity)
    return replace(cell, measure=Autoregressive(cell.measure))


def table3(r: Recipes) -> Table:
    """All systems on LM1B."""
    papers: list[float | None] = [3042, 1447, 1616, 1278, 1734, 1226]
    originals: list[float | None] = [22.83, None, 31.78, 30.60, 29.83, 28.23]
    return _comparison(r, "table3", "Perplexities on LM1B", "lm1b", (400, 100), papers, originals)


def table4(r: Recipes) -> Table:
    """All systems on OpenWebText."""
    papers: list[float | None] = [2036, 2120, 2101, 1939, 1941, 1935]
    originals: list[float | None] = [17.54, 24.10, 22.98, 22.27, 21.68, 20.73]
    return _comparison(
        r, "table4", "Perplexities on OpenWebText", "owt", (3000, 3000), papers, originals
    )


TABLE5 = {
    "AR": (2388, 1550, 2875),
    "SEDD": (2742, 1562, 3335),
    "MDLM": (2722, 1556, 3283),
    "BD3-LM S = 4": (2196, 1438, 3143),
}


def table5(r: Recipes) -> Table:
    """Zero-shot perplexities of models trained on OpenWebText."""
    rows = []
    six = six_models(r, "owt", (800, 800), [None] * 6)
    runs = {label: run for label, run, _ in six if label in TABLE5}
    runs[JOINT] = runs[AS_AR] = joint(runs["BD3-LM S = 4"])
    for label, run in runs.items():
        cells = {
            name: Cell(run, ZeroShot(r.scale.valid_rows, role=role), "ppl", paper)
            for name, role, paper in zip(
                ("LM1B", "Lambada", "Wikitext"),
                ("zero_lm1b", "lambada", "wikitext"),
                TABLE5.get(label, (None, None, None)),
                strict=True,
            )
        }
        if label == AS_AR:
            cells = {name: as_ar(cell) for name, cell in cells.items()}
        rows.append(Row((label,), cells, base=("MDLM",)))
    return Table(
        "table5",
        "Zero-shot perplexities of models trained on OpenWebText",
        ("model",),
        ("LM1B", "Lambada", "Wikitext"),
        tuple(rows),
    )


SYSTEMS: list[tuple[str, System, int]] = [
    ("BD3-LM S = 4", "bd3lm", 4),
    ("AR", "ar", 1),
    ("SEDD", "sedd", 0),
    ("MDLM", "mdlm", 0),
]


def budgets(r: Recipes) -> Table:
    """The systems at equal tokens, operations and seconds of training."""
    first, *others = SYSTEMS
    base = _of_budget(r, *first[1:])
    rows = [_budget_row((first[0], "all"), r.perplexity(base))]
    for label, system, block in others:
        for equal, run in _equal(r, base, _of_budget(r, system, block), system).items():
            rows.append(_budget_row((label, equal), r.perplexity(run)))
    both = _equal(r, base, joint(base), "joint")
    rows += [_budget_row((JOINT, equal), r.perplexity(run)) for equal, run in both.items()]
    rows += [_budget_row((AS_AR, equal), as_ar(r.perplexity(run))) for equal, run in both.items()]
    return Table(
        "budgets",
        "The systems at equal tokens, operations and seconds of training",
        ("model", "equal"),
        ("PPL", "steps", "training seconds"),
        tuple(rows),
        remark="All from scratch by one recipe, no fine-tuning; the learning rate decays over each "
        "run's own steps. Numbers of steps at equal seconds follow from the seconds of a step "
        "measured beforehand.",
    )


def _of_budget(r: Recipes, system: System, block: int) -> Run:
    """A system's run of as many steps as BD3-LM has."""
    config = r.train(system, "lm1b", block, (1,))
    return Run(replace(config, steps=r.scale.budget_steps), "lm1b")


def _equal(r: Recipes, base: Run, run: Run, timed: str) -> dict[str, Run]:
    """The run at the tokens, operations and seconds of ``base``; ``timed`` names its seconds."""
    flops = step_flops(run.config, r.vocab_size) / step_flops(base.config, r.vocab_size)
    costs = {"tokens": 1.0, "FLOPs": flops}
    if r.scale.step_seconds:
        costs["seconds"] = r.scale.step_seconds[timed] / r.scale.step_seconds["bd3lm"]
    steps = {equal: max(round(base.config.steps / cost), 1) for equal, cost in costs.items()}
    return {equal: replace(run, config=replace(run.config, steps=n)) for equal, n in steps.items()}


def _budget_row(label: tuple[str, str], perplexity: Cell) -> Row:
    run = perplexity.run
    cells = {
        "PPL": perplexity,
        "steps": Cell(run, Cost(), "steps"),
        "training seconds": Cell(run, Cost(), "seconds"),
    }
    return Row(label, cells, base=(SYSTEMS[0][0], "all"))


def figure1(r: Recipes) -> Table:
    """Training curves of table 1."""
    rows = []
    for row in table1(r).rows:
        run = row.cells["PPL"].run
        rows.append(Row(row.label, {"last training NLL": Cell(run, Curve(), "last")}))
    return Table(
        "figure1",
        "Training NLL of single-token models",
        ("model",),
        ("last training NLL",),
        tuple(rows),
        drawing="curves",
    )
