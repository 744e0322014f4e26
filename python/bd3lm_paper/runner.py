"""Train and measure for the tables, each thing once: runs and measurements by content address."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from bd3lm.checkpoint import load_checkpoint
from bd3lm.evaluate import Likelihood
from bd3lm.files import write_json, write_text
from bd3lm.training import train_only
from bd3lm_paper.corpora import Texts
from bd3lm_paper.measures import AnyMeasure, Trained
from bd3lm_paper.spec import Measure, Run, Table, record_key


class Events(Protocol):
    """Receives the progress of a sweep."""

    def planned(self, steps: int, measurements: int) -> None:
        """Called before anything runs, with the work that is left."""

    def training(self, run: Run, steps: int) -> None:
        """Called after so many more training steps, of this sweep or of another."""

    def measured(self, run: Run, measure: Measure, seconds: float) -> None:
        """Called after every measurement."""


class Sweep:
    """Runs and measurements of a set of tables, below one directory.

    ``runs/KEY/`` holds a run and ``cells/KEY.json`` a measurement; a file or folder with that name
    is complete. The sweep makes the missing ones, so a killed sweep continues where it stopped.
    Sweeps that run at the same time share the work: each claims a piece by a lock in ``claims/``,
    which its process holds. ``cells.jsonl`` archives finished measurements, one a line, sorted by
    key.

    Args:
        out: the directory.
        texts: the text behind each role.
    """

    def __init__(self, out: Path, texts: Texts) -> None:
        self.out, self.texts = out, texts
        self._untrained: set[Run] = set()

    def record(self, run: Run, measure: Measure) -> dict[str, Any] | None:
        """Return a measurement; None if it has not been made."""
        key = record_key(run, measure, self.texts.fingerprints)
        file = self._cell(key)
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        return self._archived.get(key)

    @cached_property
    def _archived(self) -> dict[str, Any]:
        """Records of ``cells.jsonl`` by key."""
        if not self._archive.is_file():
            return {}
        lines = self._archive.read_text(encoding="utf-8").splitlines()
        return {record.pop("key"): record for record in map(json.loads, lines)}

    @property
    def _archive(self) -> Path:
        return self.out / "cells.jsonl"

    def archive(self) -> None:
        """Write all measurements to ``cells.jsonl``, those that it already holds included."""
        files = sorted((self.out / "cells").glob("*.json"))
        made = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
        records = sorted((self._archived | made).items())
        lines = [json.dumps({"key": key} | record) + "\n" for key, record in records]
        write_text(self._archive, "".join(lines))

    def open_texts(self) -> int:
        """Tokenize missing texts; returns V of the tokenizer of ``lm1b``.

        Raises:
            Bd3lmError: a text or tokenizer that does not load.
        """
        with self.claim("texts"):
            _ = self.texts.fingerprints
        return self.texts.splits("lm1b").train.tokenizer.vocab_size

    def make(self, tables: Iterable[Table], events: Events) -> None:
        """Make every run and measurement that is missing.

        Raises:
            Bd3lmError: a run that cannot be made; finished ones stay.
        """
        self.open_texts()
        todo = [
            pair
            for pair in dict.fromkeys(pair for table in tables for pair in table.cells())
            if self.record(*pair) is None
        ]
        runs = dict.fromkeys(part for run, _ in todo for part in run.lineage())
        self._untrained = {run for run in runs if not self._folder(run).is_dir()}
        events.planned(sum(run.config.steps for run in self._untrained), len(todo))
        # All measurements of a run together: its weights are loaded once.
        by_run: dict[Run, list[Measure]] = {}
        for run, measure in todo:
            by_run.setdefault(run, []).append(measure)
        waiting, refused = deque(by_run.items()), 0
        while waiting:
            run, measures = waiting.popleft()
            name = f"{run.key(self.texts.fingerprints)}-cells"
            # When other sweeps are at work on all that is left, wait for one of them.
            with self.claim(name, wait=refused > len(waiting)) as mine:
                if mine:
                    self._measure(run, measures, events)
                    refused = 0
                else:
                    waiting.append((run, measures))
                    refused += 1

    def _measure(self, run: Run, measures: list[Measure], events: Events) -> None:
        trained = None
        for measure in measures:
            seconds = 0.0
            if self.record(run, measure) is None:  # another sweep may have made it since
                trained = trained or self._trained(run, events)
                started = time.perf_counter()
                assert isinstance(measure, AnyMeasure)
                values = measure.take(trained)
                seconds = time.perf_counter() - started
                self._write(run, measure, values, seconds)
            events.measured(run, measure, seconds)
        for part in self._untrained.intersection(run.lineage()):  # trained by another sweep
            self._untrained.remove(part)
            events.training(part, part.config.steps)

    @contextmanager
    def claim(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of that name; without ``wait``, False where another sweep holds it."""
        file = self.out / "claims" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _trained(self, run: Run, events: Events) -> Trained:
        for part in run.lineage():
            with self.claim(part.key(self.texts.fingerprints)):
                self._train(part, events)
        folder = self._folder(run)
        loaded = load_checkpoint(folder / "checkpoint")
        return Trained(
            loaded=loaded,
            folder=folder,
            valid=self.texts.splits(run.corpus).valid,
            text=self.texts.held_out,
        )

    def _train(self, run: Run, events: Events) -> None:
        folder = self._folder(run)
        if folder.is_dir():
            return
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        source = None if run.init is None else str(self._folder(run.init) / "checkpoint")
        partial.mkdir(parents=True)
        config = replace(run.config, init_from=source)
        train_only(config, self.texts.splits(run.corpus), partial, _Steps(run, events))
        partial.rename(folder)
        self._untrained.discard(run)

    def _folder(self, run: Run) -> Path:
        return self.out / "runs" / run.key(self.texts.fingerprints)

    def _cell(self, key: str) -> Path:
        return self.out / "cells" / f"{key}.json"

    def _write(self, run: Run, measure: Measure, values: dict[str, Any], seconds: float) -> None:
        file = self._cell(record_key(run, measure, self.texts.fingerprints))
        file.parent.mkdir(parents=True, exist_ok=True)
        summary = {
            "run": run.key(self.texts.fingerprints),
            "system": run.config.system,
            "block_size": run.config.block_size,
            "steps": run.total_steps,
            "seed": run.config.seed,
            "measure": measure.kind,
            "seconds": round(seconds, 3),
            "values": values,
        }
        write_json(file, summary)


class _Steps:
    """Reporter that counts training steps."""

    def __init__(self, run: Run, events: Events) -> None:
        self._run, self._events = run, events

    def step(self, done: int, metrics: dict[str, float]) -> None:
        self._events.training(self._run, 1)

    def validation(self, step: int, result: Likelihood) -> None:
        """Ignored: these runs are not validated."""

    def scoring(self, done: int, total: int) -> None:
        """Ignored: these runs are not validated."""

    def note(self, message: str) -> None:
        """Ignored."""
