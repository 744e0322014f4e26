"""Tables of samples: their lengths, generative perplexity and speed."""

from __future__ import annotations

from dataclasses import replace

from bd3lm_paper.measures import Generated, Lengths
from bd3lm_paper.recipes import CLIPS, Recipes, six_models
from bd3lm_paper.spec import Cell, Row, Table


def table6(r: Recipes) -> Table:
    """Length of generated documents."""
    steps = (800, 500)
    measure = Lengths(num=r.scale.long_samples, length=r.scale.long_length)
    fixed = Lengths(num=r.scale.long_samples, length=r.scale.owt_seq_len)
    runs = [
        ("AR", r.scratch("ar", "owt", steps), measure, (16384, 16384)),
        ("SEDD", r.scratch("sedd", "owt", steps), fixed, (1000, 1000)),
        ("BD3-LM S = 16", r.tuned("owt", 16, steps, clip=CLIPS[16]), measure, (798, 2927)),
    ]
    reasons = {"EOS": "eos", "degenerate": "degenerate", "full length": "length"}
    rows = tuple(
        Row(
            (label,),
            {
                "median tokens": Cell(run, how, "median", median),
                "max tokens": Cell(run, how, "max", longest),
                **{name: Cell(run, how, stop) for name, stop in reasons.items()},
            },
        )
        for label, run, how, (median, longest) in runs
    )
    return Table(
        "table6",
        "Lengths of sampled documents",
        ("model",),
        ("median tokens", "max tokens", *reasons),
        rows,
        remark="The last three columns count what ended the documents. A row is degenerate when "
        "its last 256 tokens hold less than 4 nats of entropy; they are cut, as in the original. "
        "The paper's first row, the training set itself (median 717, max 131K), is a property of "
        "its data and is not repeated here.",
    )


TABLE7: list[tuple[float, int]] = [
    (79165, 1024),
    (29987, 1023),
    (25632, 1023),
    (7576, 1023),
    (8176, 1023),
    (9785, 1023),
]


def table7(r: Recipes) -> Table:
    """Generative perplexity, entropy and cost of samples."""
    measure = Generated(num=r.scale.samples, length=r.scale.sample_length, evaluator=r.evaluator)
    rows = []
    papers: list[float | None] = [ppl for ppl, _ in TABLE7]
    models = six_models(r, "owt", (400, 100), papers)
    for (label, run, paper), (_, nfe) in zip(models, TABLE7, strict=True):
        cells = {
            "Gen. PPL": Cell(run, measure, "gen_ppl", paper),
            "NFEs": Cell(run, measure, "nfe_paper", nfe),
            "forwards": Cell(run, measure, "nfe"),
            "entropy": Cell(run, measure, "entropy"),
            "ms a token": Cell(run, measure, "ms_per_token"),
        }
        rows.append(Row((label,), cells))
    return Table(
        "table7",
        "Generative perplexity and number of function evaluations",
        ("model",),
        ("Gen. PPL", "NFEs", "forwards", "entropy", "ms a token"),
        tuple(rows),
        remark="A repeated sentence has the best generative perplexity of all, so the entropy of "
        "the samples' tokens is given too.",
    )


def speed(r: Recipes) -> Table:
    """Quality of samples against the time they take."""
    scale, length = r.scale, r.scale.sample_length
    exact = Generated(num=scale.samples, length=length, evaluator=r.evaluator)
    ways: dict[str, list[tuple[str, Generated]]] = {
        "SEDD": [
            ("a level a token", replace(exact, steps=length)),
            ("a level every 4 tokens", replace(exact, steps=length // 4)),
        ],
        "MDLM": [
            ("first hitting", exact),
            ("4 tokens a forward", replace(exact, tokens_per_forward=4)),
        ],
    }
    rows = []
    for label, run, _ in six_models(r, "owt", (400, 100), [None] * 6):
        chosen = ways.get(label, [("", exact)])
        if label.startswith("BD3-LM"):
            chosen = [
                ("first hitting", exact),
                ("2 tokens a forward", replace(exact, tokens_per_forward=2)),
                ("4 tokens a forward", replace(exact, tokens_per_forward=4)),
            ]
        for way, measure in chosen:
            alone = replace(measure, num=1, evaluator=None)
            cells = {
                "ms a token": Cell(run, measure, "ms_per_token"),
                "Gen. PPL": Cell(run, measure, "gen_ppl"),
                "entropy": Cell(run, measure, "entropy"),
                "forwards": Cell(run, measure, "nfe"),
                "ms a token, one row": Cell(run, alone, "ms_per_token"),
            }
            rows.append(Row((label, way), cells))
    return Table(
        "speed",
        "Quality of samples against seconds",
        ("model", "way"),
        ("ms a token", "Gen. PPL", "entropy", "forwards", "ms a token, one row"),
        tuple(rows),
        remark=f"{scale.samples} rows at once, and one alone. Times are valid only if nothing "
        "else ran.",
        drawing="scatter",
    )
