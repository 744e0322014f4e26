"""Tables and figures of the BD3-LM papers: experiments as data, and a runner that makes them.

"The paper" in this package is the reproduction that docs/results.md names; its tables are the ones
made again here.
"""

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
