"""Loggers of ``--log``: callbacks that write a run's metrics for other programs."""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from bd3lm.config.names import LoggerName
from bd3lm.errors import ConfigError
from bd3lm.extras import require
from bd3lm.files import append_line, write_text
from bd3lm.training.callbacks import Callback, RunStart
from bd3lm.training.metrics import read_metrics

PROJECT = "bd3lm"
"""Project that runs belong to, in the services that have projects."""


def make_loggers(names: Sequence[LoggerName]) -> list[Callback]:
    """Make loggers by their names, before any work.

    Raises:
        ConfigError: a name that is not known.
        MissingPackageError: a logger whose package is not installed.
    """
    loggers: dict[LoggerName, type[Callback]] = {
        "csv": CsvLogger,
        "tensorboard": TensorBoardLogger,
        "wandb": WandbLogger,
        "trackio": TrackioLogger,
    }
    for name in names:
        if name not in loggers:
            raise ConfigError("log", name, "one of " + ", ".join(get_args(LoggerName)))
    return [loggers[name]() for name in dict.fromkeys(names)]


class CsvLogger(Callback):
    """Write ``metrics.csv``, with a row a line of ``metrics.jsonl``.

    After a resumption, or after going back to a checkpoint, it is written anew from there.
    """

    COLUMNS = (
        *("step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds"),
        *("data_seconds", "memory", "skew", "skipped", "val_nelbo", "val_ppl", "val_bpb"),
    )

    def start(self, run: RunStart) -> None:
        """Write the header, and the rows of the steps that are done."""
        self._out = run.out
        lines = run.out / "metrics.jsonl"
        rows = read_metrics(lines) if lines.exists() else []
        text = [_row(dict(zip(self.COLUMNS, self.COLUMNS, strict=True)), self.COLUMNS)]
        text += [_row(row, self.COLUMNS) for row in rows]
        write_text(self._file, "".join(line + "\n" for line in text))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a row."""
        if "rewound_from" in values:
            self.start(RunStart(self._out, {}, step))
        else:
            append_line(self._file, _row({"step": step, **values}, self.COLUMNS))

    @property
    def _file(self) -> Path:
        return self._out / "metrics.csv"


def _row(values: Mapping[str, Any], columns: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([values.get(name, "") for name in columns])
    return line.getvalue()


class TensorBoardLogger(Callback):
    """Write event files for TensorBoard to ``tensorboard/`` in the run's directory.

    Later steps of an earlier process are purged where the run is resumed or goes back.
    """

    def __init__(self) -> None:
        require("tensorboard", "tensorboard", "--log tensorboard")

    def start(self, run: RunStart) -> None:
        """Open a file of events."""
        self._out = run.out
        self._open(run.step)
        self._writer.add_text("config", f"```\n{dict(run.config)}\n```", run.step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = step + 1 if step else None
        self._writer = SummaryWriter(str(self._out / "tensorboard"), purge_step=purged)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a point to each curve."""
        if "rewound_from" in values:
            self._writer.close()
            self._open(step)
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Close the file."""
        self._writer.close()


class WandbLogger(Callback):
    """Log to Weights & Biases; ``WANDB_MODE`` and its other variables are obeyed.

    A resumed run continues the same curves: ``wandb-id`` in its directory names them.
    """

    def __init__(self) -> None:
        self._wandb: Any = require("wandb", "wandb", "--log wandb")

    def start(self, run: RunStart) -> None:
        """Open or continue the run."""
        self._run = self._wandb.init(
            project=PROJECT,
            name=run.out.name,
            dir=str(run.out),
            id=_identity(run.out / "wandb-id"),
            resume="allow",
            config=dict(run.config),
        )
        # The service refuses steps that do not grow; a run may go back to a checkpoint.
        self._run.define_metric("*", step_metric="optimizer_step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of a line."""
        self._run.log({"optimizer_step": step, **_numbers(values)})

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Keep the summary, and close the run."""
        self._run.summary.update(_numbers(summary or {}))
        self._run.finish(exit_code=0 if summary else 1)


class TrackioLogger(Callback):
    """Log to Trackio, which keeps runs on this machine or in a Space of the hub."""

    def __init__(self) -> None:
        self._trackio: Any = require("trackio", "trackio", "--log trackio")

    def start(self, run: RunStart) -> None:
        """Open or continue the run, which has the name of its directory."""
        self._run = self._trackio.init(
            project=PROJECT, name=run.out.name, resume="allow", config=dict(run.config)
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of a line."""
        self._trackio.log(_numbers(values), step=step)

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Send what is left."""
        self._trackio.finish()


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _identity(file: Path) -> str:
    """A random name that a run keeps."""
    if not file.exists():
        write_text(file, uuid.uuid4().hex)
    return file.read_text().strip()
