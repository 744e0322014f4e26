"""Results of a command: facts in two columns, and the commands to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text


def facts(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """Print a title and two columns: names in bold, values as they are."""
    console.print(Text(title, style="bold"))
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        line = f"{name:<{width}}  {value}".rstrip()
        console.print(Text(line[:width], style="bold") + Text(line[width:]))


def training_summary(console: Console, summary: Mapping[str, Any], out: Path) -> None:
    """Print a sample and the results of a training run, and the commands to run next."""
    sample = (out / "samples.txt").read_text(encoding="utf-8").split("\n" + "-" * 80)[0]
    console.print(Text("\nA sample", style="bold"))
    console.print(f"{sample.strip()}\n")
    names = ("config.json", "metrics.jsonl", "loss.png", "samples.txt", "summary.json")
    files = [name for name in names if (out / name).exists()]
    rows = {
        "validation": likelihood_line(summary),
        "trained": f"{summary['tokens']:,} tokens in {duration(summary['seconds'])} "
        f"({summary['tokens_per_second']:,.0f} tokens/s, MFU {summary['mfu']:.0%}), "
        f"{summary['steps']} steps",
        "samples": f"{summary['sample_known_words']:.1%} of sampled words occur in the training "
        f"text; distinct-2 {summary['sample_distinct_2']:.3f} "
        f"(validation text: {summary['valid_distinct_2']:.3f}); "
        f"{summary['nfe']:.0f} forwards a sample",
        "files": f"{out}/ {' '.join(files)} checkpoint/",
        "next": command("bd3lm-sample", out, "--prompt", "The old house"),
        "": command("bd3lm-eval", out),
    }
    if "profile" in summary:
        facts(console, "Time of a step", _profile_rows(summary["profile"]))
    facts(console, f"Trained in {out}", rows)


def command(*words: object) -> str:
    """A command line, quoted for a shell."""
    return shlex.join(map(str, words))


def duration(seconds: float) -> str:
    """A time in the two largest units that it has.

    Examples:
        >>> duration(7.2), duration(200), duration(7300), duration(200_000)
        ('7 s', '3 min 20 s', '2 h 1 min', '2 d 7 h')
    """
    left, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or (unit == "s" and not parts):
            parts.append(f"{number} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])


def _profile_rows(profile: Mapping[str, Any]) -> dict[str, str]:
    """Milliseconds and share of each component, and the step itself."""
    total = profile["seconds"]
    rows = {
        name: f"{1e3 * value:8.1f} ms {value / total:6.1%}"
        for name, value in profile["components"].items()
    }
    return rows | {"a step": f"{1e3 * total:8.1f} ms (with the profiler on; profile.json)"}


def likelihood_line(summary: Mapping[str, Any]) -> str:
    """One line on a likelihood, its standard errors and its coverage of the text."""
    kind = summary.get("val_likelihood", "nelbo")
    name, nats = ("NELBO", "nelbo") if kind == "nelbo" else (f"NLL ({kind})", "nll")
    line = f"{name} {summary[f'val_{nats}']:.4f} nats/token, PPL {summary['val_ppl']:.2f}"
    data = summary["val_data_error"]
    if summary["val_bpb"] is not None:
        bpb = summary["val_bpb"]
        line += f", {bpb:.3f}"
        if data is not None:
            line += f" ± {data * bpb / summary[f'val_{nats}']:.3f}"
        line += " bits per byte"
    elif summary["val_coverage"] < 1:
        line += " (bits per byte need the whole text)"
    if kind != "nelbo" and summary["val_nelbo"] is not None:
        line += f"; NELBO {summary['val_nelbo']:.4f}"
    errors = "one row, so no s.e. of the data" if data is None else f"data s.e. {data:.4f}"
    if summary["estimator"] != "exact":
        errors = f"estimator s.e. {summary['val_mc_error']:.4f}, {errors}"
    return (
        f"{line} ({summary['estimator']}; {summary['val_tokens']:,} tokens, "
        f"{summary['val_coverage']:.0%} of the split; {errors})"
    )
