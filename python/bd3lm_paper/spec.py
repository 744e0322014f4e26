"""Tables as data: rows of cells, each one number measured on one trained model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from bd3lm.config import TrainConfig, to_dict

MACHINE_FIELDS = (
    "data",
    "valid",
    "tokenizer",
    "device",
    "attention",
    "compile",
    "micro_batch",
    "init_from",
    "checkpoint_every",
    "log_every",
)
"""Settings that change where and how fast a run happens, but not its result."""


@dataclass(frozen=True)
class Run:
    """One trained model, identified by its settings, text and ancestors.

    Attributes:
        config: its settings; those of :data:`MACHINE_FIELDS` do not count.
        corpus: role of its text: ``lm1b`` or ``owt``.
        init: the run whose averaged weights it starts from.
    """

    config: TrainConfig
    corpus: str
    init: Run | None = None

    def seeded(self, seed: int) -> Run:
        """Copy with another seed, its ancestors included."""
        init = None if self.init is None else self.init.seeded(seed)
        return replace(self, config=replace(self.config, seed=seed), init=init)

    def lineage(self) -> Iterator[Run]:
        """Yield the ancestors, oldest first, then the run itself."""
        if self.init is not None:
            yield from self.init.lineage()
        yield self

    @property
    def label(self) -> str:
        """Short description for people."""
        cfg = self.config
        return f"{cfg.system} S={cfg.block} {cfg.noise.schedule} seed {cfg.seed}"

    @property
    def total_steps(self) -> int:
        """Steps of the whole lineage."""
        return sum(run.config.steps for run in self.lineage())

    def key(self, texts: Mapping[str, str]) -> str:
        """Content address: sixteen hex digits.

        Args:
            texts: fingerprint of the tokenized text behind each role.
        """
        config = {
            k: v for k, v in non_default_settings(self.config).items() if k not in MACHINE_FIELDS
        }
        init = None if self.init is None else self.init.key(texts)
        return digest({"config": config, "text": texts[self.corpus], "init": init})


class Measure(Protocol):
    """A measurement of a trained model: a frozen dataclass of settings."""

    @property
    def kind(self) -> str:
        """Name in records."""
        ...

    @property
    def texts(self) -> tuple[str, ...]:
        """Roles of the texts it reads, beyond its run's own."""
        ...


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        run: the run to measure.
        measure: the measurement.
        field: one of the measurement's numbers.
        paper: the figure of the reproduction (Kordas et al.), if it has one.
        original: the figure of the original paper (Arriola et al.), if it is known here.
    """

    run: Run
    measure: Measure
    field: str
    paper: float | None = None
    original: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: its name, one text a label column.
        cells: by column name; a missing column stays empty.
        base: label of the row that this one is compared with, seed by seed and row by row of the
            text, in nats a token; None: with none.
    """

    label: tuple[str, ...]
    cells: Mapping[str, Cell]
    base: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper.

    Attributes:
        name: table1 … table13, figure1, figure2, combined, budgets, speed.
        title: its heading.
        labels: names of the label columns.
        columns: names of the number columns, in order.
        rows: its lines.
        seeds: every run is made once for each.
        remark: a note on reading the paper's own figures.
        drawing: how the picture is drawn: dots of the first column, training curves, or the
            second and third columns over the first.
        scale: that it was made at: smoke, cpu or full.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (1,)
    remark: str = ""
    drawing: Literal["dots", "curves", "scatter"] = "dots"
    scale: str = ""

    def cells(self) -> Iterator[tuple[Run, Measure]]:
        """Yield every (run, measure) pair once."""
        seen = set()
        for seed in self.seeds:
            for row in self.rows:
                for cell in row.cells.values():
                    pair = (cell.run.seeded(seed), cell.measure)
                    if pair not in seen:
                        seen.add(pair)
                        yield pair


def record_key(run: Run, measure: Measure, texts: Mapping[str, str]) -> str:
    """Content address of a measurement."""
    settings = dataclasses.asdict(measure)  # type: ignore[call-overload]
    read = {role: texts[role] for role in measure.texts}
    return digest(
        {"run": run.key(texts), "kind": measure.kind, "settings": settings, "texts": read}
    )


def non_default_settings(config: TrainConfig) -> dict[str, Any]:
    """Settings that differ from the defaults, so that a new option does not change old keys.

    Changing a default would reuse old results: change keys on purpose when you do.
    """

    def differing(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            default = defaults[name]
            if isinstance(value, dict) and isinstance(default, dict):
                value = differing(value, default)
                default = {}
            if value != default:
                found[name] = value
        return found

    return differing(to_dict(config), to_dict(TrainConfig()))


def digest(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
