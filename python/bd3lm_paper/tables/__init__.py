"""The paper's tables as data: runs and measures of every row, and the published figures."""

from __future__ import annotations

from collections.abc import Callable

from bd3lm_paper.recipes import Recipes
from bd3lm_paper.spec import Table
from bd3lm_paper.tables.noise import combined, table2, table8, table10, table11, table13
from bd3lm_paper.tables.samples import speed, table6, table7
from bd3lm_paper.tables.systems import budgets, figure1, table1, table3, table4, table5

TABLES: dict[str, Callable[[Recipes], Table]] = {
    f.__name__: f
    for f in (
        *(table1, table2, table3, table4, table5, table6, table7, table8, table10, table11),
        *(table13, combined, budgets, speed, figure1),
    )
}
"""Tables that need training. Tables 9 and 12 and figure 2 are formulas: see ``formulas.py``."""
