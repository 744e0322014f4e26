"""``bd3lm-train``: text in; a trained, scored and sampled model out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from bd3lm.cli.common import run
from bd3lm.cli.progress import RichReporter
from bd3lm.cli.summary import training_summary
from bd3lm.config import PRESETS, TrainConfig, check, preset
from bd3lm.plots import plot_loss
from bd3lm.training import holds_run, read_metrics, run_training, saved_config

DESCRIPTION = f"""Train a block-diffusion language model, score its validation split, draw samples.

usage: bd3lm-train [PRESET] [OPTIONS]

PRESET is one of {", ".join(PRESETS)} (default: demo, which needs minutes on two cores and
trains on the English text shipped with the package). Every option below overrides the preset."""


@dataclass(frozen=True)
class TrainArgs:
    """What the command line adds to a run's settings."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """Directory of the run. None: runs/PRESET, or the first free runs/PRESET-N."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --out from its last checkpoint with its own settings, or begin it where
    there is none. With --steps, a run is extended."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also say where the time of a step went, at the end and in profile.json."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``bd3lm-train``."""
    run(lambda: train(sys.argv[1:] if argv is None else argv))


def train(argv: list[str]) -> None:
    """Parse, build, train, report."""
    named = bool(argv) and not argv[0].startswith("-")
    name = argv[0] if named else "demo"
    preset_config = preset(name, _value(argv, "--system") or "bd3lm")
    begun = None if named or "--resume" not in argv else _begun(_value(argv, "--out"))
    base = TrainArgs(begun or preset_config)
    args = tyro.cli(
        TrainArgs,
        prog="bd3lm-train",
        description=DESCRIPTION,
        default=base,
        args=argv[1:] if named else argv,
    )
    cfg, out = args.config, args.out or _free_directory(name)
    if args.resume:
        check(args.out is not None, "out", None, "the directory of a run where --resume is given")
        if not named and cfg == base.config:  # nothing but --out and --resume: there must be a run
            cfg = saved_config(out)
    console = Console()
    with RichReporter(console, cfg.steps) as reporter:
        summary = run_training(cfg, out, reporter, resume=args.resume, profile=args.profile)
    title = f"{cfg.system}, S={cfg.block}, L={cfg.seq_len}"
    plot_loss(read_metrics(out / "metrics.jsonl"), out / "loss.png", title)
    training_summary(console, summary, out)


def _begun(out: str | None) -> TrainConfig | None:
    """Settings of a run, which options then change; None where there is no run."""
    return None if out is None or not holds_run(Path(out)) else saved_config(Path(out))


def _value(argv: list[str], option: str) -> str | None:
    """What an option is given, before the parser runs: its presets depend on the system."""
    for index, word in enumerate(argv):
        if word.startswith(option + "="):
            return word.partition("=")[2]
        if word == option and index + 1 < len(argv):
            return argv[index + 1]
    return None


def _free_directory(name: str) -> Path:
    first = Path("runs") / name
    if not first.exists():
        return first
    return next(p for n in count(2) if not (p := Path("runs") / f"{name}-{n}").exists())
