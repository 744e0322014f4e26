"""Tables and figures of the BD3-LM papers: experiments as data, and a runner that makes them.

"The paper" in this package is the reproduction that docs/results.md names; its tables are the ones
made again here.


Names are imported when they are first used, so the help of ``bd3lm paper`` needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_MODULES = {
    "TABLES": "tables",
    "Cell": "spec",
    "Corpora": "scale",
    "Events": "runner",
    "Row": "spec",
    "Run": "spec",
    "Scale": "scale",
    "ScaleName": "scale",
    "Sweep": "runner",
    "Table": "spec",
    "make_tables": "make",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
