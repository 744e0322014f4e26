"""Train the six systems of the paper's Table 3 by its recipe, one after the other.

The settings are those of ``bd3lm-paper`` at full scale: AR, SEDD and MDLM for 500 steps, BD3-LMs
for 400 at S = L and 100 at S = 16, 8 and 4, of 512 rows of 128 tokens. ``table3.py prepare --text
FILE`` tokenizes the text beforehand, on any machine; its folder travels along. ``table3.py
train`` trains and scores every system that is not done yet. It stops at ``--stop`` seconds and can
be started again: a run that was stopped is resumed. Every finding is one line of
``$OUT/table3.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common import DEVICE, OUT, REHEARSE
from learning import Quiet

MOST_BYTES = 50 << 20
"""Folder of the prepared text, which is copied to the machine."""


class Recording(Quiet):
    """A reporter whose notes are findings."""

    def note(self, message: str) -> None:
        record(note=message, ok=not message.startswith("compile"))


def systems() -> dict[str, tuple[Any, str | None, float | None]]:
    """Name -> (settings, name of the run it starts from, the paper's perplexity)."""
    from bd3lm_paper.recipes import Recipes
    from bd3lm_paper.scale import scale_named
    from bd3lm_paper.tables import TABLES

    found: dict[str, tuple[Any, str | None, float | None]] = {}
    for row in TABLES["table3"](Recipes(scale_named("smoke" if REHEARSE else "full"))).rows:
        cell = row.cells["PPL"]
        if cell.paper is None:  # not one of the paper's systems
            continue
        source = None
        for run in cell.run.lineage():
            last = run is cell.run
            name = row.label[0] if last else f"pretrained {run.config.system}"
            cfg = dataclasses.replace(
                run.config, data=None, device=DEVICE, micro_batch=None,
                compile=False if REHEARSE else None, checkpoint_every=run.config.steps,
                eval=dataclasses.replace(run.config.eval, every=0),
            )  # fmt: skip
            found[name] = (cfg, source, cell.paper if last else None)
            source = name
    return found


def record(**values: Any) -> None:
    """Append one line to the results at once."""
    line = json.dumps({"t": round(time.time(), 2), **values}, default=str)
    with (OUT / "table3.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line[:500], flush=True)


def prepare(text: str | None, data: Path) -> None:
    """Tokenize a text, or the shipped one, into ``data``; a share of it is held out.

    Raises:
        SystemExit: the result is too large to travel.
    """
    from bd3lm.data.resolve import open_splits

    open_splits(text, None, "default", data, print)
    size = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{data} holds {size >> 20} MiB; it must be at most 50, to travel")
    print(f"{data}: {size / 2**20:.1f} MiB")


def train_one(
    name: str, cfg: Any, source: str | None, paper: float | None, data: Any, until: float
) -> bool:
    """Train or resume one system and score it; False if the time was up first."""
    from bd3lm.errors import InterruptedRunError
    from bd3lm.training import Trainer

    out = folder(name)
    out.mkdir(parents=True, exist_ok=True)
    if source is not None:
        cfg = dataclasses.replace(cfg, init_from=str(folder(source) / "checkpoint"))
    trainer = Trainer(cfg, data.train, data.valid, out, Recording())
    if trainer.checkpoints.latest() is not None:
        trainer.resume()
    elif cfg.init_from is not None:
        trainer.start_from(Path(cfg.init_from))
    alarm = threading.Timer(max(until - time.monotonic(), 0.1), interrupt)
    alarm.daemon = True
    alarm.start()
    begun, first = time.monotonic(), trainer.steps_done
    try:
        trainer.run()
    except InterruptedRunError:
        record(system=name, ok=True, finished=False, steps=trainer.steps_done)
        return False
    finally:
        alarm.cancel()
    steps = trainer.steps_done - first
    spent = max(time.monotonic() - begun, 1e-9)
    result = trainer.validate(quick=REHEARSE)
    record(
        system=name, ok=True, finished=True, steps=trainer.steps_done, seconds=round(spent, 1),
        tokens_per_second=steps * cfg.batch_size * cfg.seq_len / spent,
        loss=trainer.last.get("loss"), ppl=result.ppl, nelbo=result.nelbo,
        mc_error=result.mc_error, data_error=result.data_error, estimator=result.estimator,
        paper=paper,
    )  # fmt: skip
    return True


def folder(name: str) -> Path:
    """Directory of a run."""
    return OUT / "table3" / name.lower().replace(" ", "-").replace("=", "s")


def interrupt() -> None:
    """Ask the run to save itself and stop, as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def train(data: Path, stop: float, only: list[str] | None) -> None:
    """Train every system that is not finished, until ``stop`` seconds are over."""
    from bd3lm.data.resolve import open_splits

    OUT.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + stop
    splits = open_splits(None, None, "default", data, print)
    path = OUT / "table3.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["system"] for row in rows if row.get("finished")}
    for name, (cfg, source, paper) in systems().items():
        if name in done or (only and name not in only):
            continue
        if time.monotonic() >= until or (source is not None and source not in done):
            continue
        try:
            if train_one(name, cfg, source, paper, splits, until):
                done.add(name)
        except Exception as error:  # the other systems are trained all the same
            record(system=name, ok=False, error=f"{type(error).__name__}: {error}"[:600])
    record(ok=len(done) == len(systems()), done=sorted(done))


def main() -> None:
    """``prepare`` or ``train``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on a CPU")
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("--text", help="a text file; none: the shipped English text")
    first.add_argument("--data", type=Path, required=True)
    second = commands.add_parser("train")
    second.add_argument("--data", type=Path, required=True)
    second.add_argument("--stop", type=float, default=540.0, help="seconds")
    second.add_argument("--only", nargs="*", metavar="SYSTEM", help="names as in the results")
    args = parser.parse_args()
    if args.rehearse and not REHEARSE:
        os.environ["FIRST_RUN_REHEARSE"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if args.command == "prepare":
        prepare(args.text, args.data)
    else:
        train(args.data, args.stop, args.only)


if __name__ == "__main__":
    main()
