"""The paper's tables and figures: what to run as data, and one runner that makes it."""

from bd3lm_paper.make import make_tables
from bd3lm_paper.runner import Events, Sweep
from bd3lm_paper.scale import Corpora, Scale, ScaleName
from bd3lm_paper.spec import Cell, Row, Run, Table
from bd3lm_paper.tables import TABLES

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
