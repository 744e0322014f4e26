"""``bd3lm train``: text in; a trained, scored and sampled model out."""

from __future__ import annotations

import dataclasses
import sys
import typing
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from bd3lm.cli.common import PlainConsole, check_checkpoint, check_exists, parse, run
from bd3lm.config import PRESETS, TrainConfig, check, preset
from bd3lm.config.names import LoggerName
from bd3lm.errors import ExistsError
from bd3lm.ranks.place import find_place

DESCRIPTION = f"""Train a block-diffusion language model, score its validation split, draw samples.

PROG [PRESET] [OPTIONS]: PRESET is one of {", ".join(PRESETS)}, anywhere on the line. The default is
demo, which needs minutes on two cores and trains on the English text shipped with the package.
Every option below overrides the preset."""


@dataclass(frozen=True)
class TrainArgs:
    """Options of the command line besides a run's settings."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """Directory of the run. None: runs/PRESET, or the first free runs/PRESET-N."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --out, or at --mirror, from its last checkpoint with its own settings, or
    begin it where there is none. With --steps, a run is extended."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also measure where the time of a step went, for the summary and profile.json."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go in addition to metrics.jsonl: csv writes metrics.csv; each of the others
    needs the extra of its name."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare prepared data with its digests even if that was done before and nothing changed."""


def main(argv: list[str] | None = None, prog: str = "bd3lm-train") -> None:
    """Entry point of ``bd3lm-train`` and ``bd3lm train``."""
    run(lambda: train(sys.argv[1:] if argv is None else argv, prog))


def train(argv: list[str], prog: str) -> None:
    """Parse, check, train, report."""
    name, words = _preset_of(argv)
    base = TrainArgs(preset(name or "demo", _value(argv, "--system") or "bd3lm"))
    if not {"--help", "-h"} & set(argv):
        base = dataclasses.replace(base, config=_defaults(base.config, argv, name))
    described = DESCRIPTION.replace("PROG", prog)
    args = parse(TrainArgs, prog, words, description=described, default=base)
    place = find_place()
    check(args.out is not None or place.size == 1, "out", None, "given where several ranks train")
    cfg, out = args.config, args.out or _free_directory(name or "demo")
    if args.resume:
        check(args.out is not None, "out", None, "the directory of a run where --resume is given")
        if name is None and cfg == base.config and cfg.mirror is None:
            # Only --out and --resume: there must be a run.
            from bd3lm.training.directory import check_holds_run

            check_holds_run(out)
    else:
        _check_inputs(cfg, out)
    if place.rank == 0:
        _run(cfg, out, args)
    else:
        from bd3lm.training import run_training
        from bd3lm.training.reporter import Silent

        run_training(cfg, out, Silent(), resume=args.resume, profile=args.profile)


def _run(cfg: TrainConfig, out: Path, args: TrainArgs) -> None:
    """Import PyTorch, train, report."""
    from bd3lm.cli.progress import RichReporter
    from bd3lm.cli.summary import training_summary
    from bd3lm.training import make_loggers, run_training

    loggers = make_loggers(args.log)
    console = PlainConsole()
    with RichReporter(console, cfg.steps) as reporter:
        summary = run_training(
            cfg,
            out,
            reporter,
            resume=args.resume,
            profile=args.profile,
            verify=args.verify or "auto",
            callbacks=loggers,
        )
    _plot(cfg, out, console)
    training_summary(console, summary, out)


def _plot(cfg: TrainConfig, out: Path, console: PlainConsole) -> None:
    """Write loss.png, or name the package it needs: a run does not fail for want of a picture."""
    from bd3lm.errors import MissingPackageError
    from bd3lm.plots import plot_loss, save
    from bd3lm.training import read_metrics

    title = f"{cfg.system}, S={cfg.block}, L={cfg.seq_len}"
    try:
        save(plot_loss(read_metrics(out / "metrics.jsonl"), title), out / "loss.png")
    except MissingPackageError as error:
        console.print(f"no loss.png: {error}")


def _check_inputs(cfg: TrainConfig, out: Path) -> None:
    """Refuse data that is not there and a directory that is taken, before PyTorch is imported."""
    for path in (cfg.data, cfg.valid):
        if path is not None and path != "-" and not path.startswith("hub:"):
            check_exists(path)
    if out.exists() and not out.is_dir():
        raise ExistsError(f"{out} is a file; choose another --out")


def _defaults(cfg: TrainConfig, argv: list[str], name: str | None) -> TrainConfig:
    """Settings that options override: the preset, a run to resume or a checkpoint to begin with."""
    out, source = _value(argv, "--out"), _value(argv, "--init-from")
    saved = None
    if "--resume" in argv and out is not None and (name is None or source is not None):
        saved = _saved(Path(out), _value(argv, "--mirror"))
    if saved is not None and name is None:
        return saved
    if source is None:
        return cfg
    if saved is None:
        return _like_checkpoint(cfg, source, _value(argv, "--tokenizer"))
    from bd3lm.training.initial import for_native_weights

    kept = {"tokenizer": saved.tokenizer, "init_unigram": saved.init_unigram}
    return dataclasses.replace(for_native_weights(cfg, saved.model), **kept)


def _saved(out: Path, mirror: str | None) -> TrainConfig | None:
    """Settings of the run in a directory or, where there is none, of its mirror."""
    from bd3lm.training import holds_run

    if holds_run(out):
        from bd3lm.training import saved_config

        return saved_config(out)
    if mirror is None:
        return None
    from bd3lm.training.mirror import mirrored_config

    return mirrored_config(mirror)


def _like_checkpoint(cfg: TrainConfig, source: str, tokenizer: str | None) -> TrainConfig:
    """Take the shape and the tokenizer from a checkpoint."""
    check_checkpoint(source)
    from bd3lm.checkpoint import load_checkpoint
    from bd3lm.checkpoint.loading import is_foreign
    from bd3lm.training.initial import for_native_weights

    if is_foreign(source):  # the run itself takes all of it
        return cfg
    found = load_checkpoint(source, tokenizer=tokenizer)
    file = found.path / "tokenizer.json"
    if file.is_file():
        cfg = dataclasses.replace(cfg, tokenizer=str(file))
    return for_native_weights(cfg, found.config.model)


def _preset_of(argv: list[str]) -> tuple[str | None, list[str]]:
    """The preset that a command line names, wherever it is, and the words without it.

    The first word is one unless it is an option. Any other is one if it has the name of a preset
    and is not the value of an option.
    """
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    flags = {f"--{name}" for name in _flags(TrainArgs)}
    for index, (before, word) in enumerate(pairwise(argv), 1):
        takes_value = before.startswith("--") and "=" not in before and before not in flags
        if word in PRESETS and not takes_value:
            return word, argv[:index] + argv[index + 1 :]
    return None, argv


def _flags(kind: type[Any], prefix: str = "") -> list[str]:
    """Options without a value: those of truth values, as ``--name`` and ``--no-name``."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        option = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            below = "" if hint is TrainConfig else f"{option}."
            found += _flags(typing.cast("type[Any]", hint), below)
        elif hint is bool:
            group, _, last = option.rpartition(".")
            found += [option, f"{group}{'.' if group else ''}no-{last}"]
    return found


def _value(argv: list[str], option: str) -> str | None:
    """The value of an option, before the parser runs: the defaults of others depend on it."""
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
