"""The paper's tables and figures: what to run as data, and one runner that makes it."""

from bd3lm.experiments.make import make_tables
from bd3lm.experiments.runner import Events, Sweep
from bd3lm.experiments.scale import Corpora, Scale, ScaleName
from bd3lm.experiments.spec import Cell, Row, Run, Table
from bd3lm.experiments.tables import TABLES

__all__ = [
    "TABLES",
    "Cell",
    "Corpora",
    "Events",
    "Row",
    "Run",
    "Scale",
    "ScaleName",
    "Sweep",
    "Table",
    "make_tables",
]
