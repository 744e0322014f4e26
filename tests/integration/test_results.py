"""The published page says what the published measurements say."""

import re
from pathlib import Path

from bd3lm.experiments import TABLES, Corpora
from bd3lm.experiments.corpora import Texts
from bd3lm.experiments.formulas import FORMULAS
from bd3lm.experiments.render import to_markdown
from bd3lm.experiments.runner import Sweep
from bd3lm.experiments.scale import scale_named
from bd3lm.experiments.tables import Recipes

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_made_from_the_cells(tmp_path):
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    sweep = Sweep(DOCS / "results", Texts(Corpora(), tmp_path / "data"))
    recipes = Recipes(
        scale_named("cpu"), None, sweep.texts.splits("lm1b").train.tokenizer.vocab_size
    )
    shown = re.findall(r"<!-- (\w+) -->\n(.*?)\n!\[", page, flags=re.DOTALL)
    assert len(shown) >= 8
    for name, text in shown:
        if name in FORMULAS:
            assert text == FORMULAS[name]().markdown, name
        else:
            table = TABLES[name](recipes)
            assert all(sweep.record(*cell) is not None for cell in table.cells()), name
            assert text == to_markdown(sweep, table), name
