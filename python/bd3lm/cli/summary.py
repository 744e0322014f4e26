"""The last thing a command prints: what happened, and where it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def facts(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """Two columns, no frame: a name and what there is to say about it."""
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def training_summary(console: Console, summary: Mapping[str, Any], out: Path) -> None:
    """What a training run came to, and the commands that go on from it."""
    sample = (out / "samples.txt").read_text(encoding="utf-8").split("\n" + "-" * 80)[0]
    console.print(f"\n[bold]A sample[/bold]\n{sample.strip()}\n", markup=True, highlight=False)
    rows = {
        "validation": likelihood_line(summary),
        "trained": f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s "
        f"({summary['tokens_per_second']:,.0f} tokens/s, MFU {summary['mfu']:.0%}), "
        f"{summary['steps']} steps",
        "samples": f"{summary['sample_known_words']:.1%} of sampled words occur in the training "
        f"text; distinct-2 {summary['sample_distinct_2']:.3f} "
        f"(validation text: {summary['valid_distinct_2']:.3f}); "
        f"{summary['nfe']:.0f} forwards a sample",
        "files": f"{out}/ config.json metrics.jsonl loss.png samples.txt summary.json checkpoint/",
        "next": f"bd3lm-sample {out}/checkpoint --prompt 'The old house'",
        "": f"bd3lm-eval {out}/checkpoint",
    }
    if "profile" in summary:
        facts(console, "Where a step's time went", _profile_rows(summary["profile"]))
    facts(console, f"Trained in {out}", rows)


def _profile_rows(profile: Mapping[str, Any]) -> dict[str, str]:
    """Milliseconds and share of each component, and the step itself."""
    total = profile["seconds"]
    rows = {
        name: f"{1e3 * value:8.1f} ms {value / total:6.1%}"
        for name, value in profile["components"].items()
    }
    return rows | {"a step": f"{1e3 * total:8.1f} ms (watched; profile.json)"}


def likelihood_line(summary: Mapping[str, Any]) -> str:
    """One sentence on a likelihood, its certainty and its coverage; a run's is its NELBO."""
    kind = summary.get("val_likelihood", "nelbo")
    name, nats = ("NELBO", "nelbo") if kind == "nelbo" else (f"NLL ({kind})", "nll")
    line = f"{name} {summary[f'val_{nats}']:.4f} nats/token, PPL {summary['val_ppl']:.2f}"
    if summary["val_bpb"] is not None:
        line += f", {summary['val_bpb']:.3f} bits per byte"
    if kind != "nelbo" and summary["val_nelbo"] is not None:
        line += f"; NELBO {summary['val_nelbo']:.4f}"
    errors = f"data s.e. {summary['val_data_error']:.4f}"
    if summary["estimator"] != "exact":
        errors = f"estimator s.e. {summary['val_mc_error']:.4f}, {errors}"
    return (
        f"{line} ({summary['estimator']}; {summary['val_tokens']:,} tokens, "
        f"{summary['val_coverage']:.0%} of the split; {errors})"
    )
