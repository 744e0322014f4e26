"""The table of memory and traffic in the documentation is the one that the library computes."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_holds_the_table():
    spec = importlib.util.spec_from_file_location("scaling", DOCS / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    assert scaling.page() == scaling.PAGE.read_text(encoding="utf-8"), "run docs/scaling.py"
    costs = {ranks: scaling.cost("8B", "fsdp", ranks) for ranks in scaling.RANKS}
    assert costs[8].state == 8 * costs[64].state == 64 * costs[512].state
    assert costs[8].memory < 80e9 < scaling.cost("8B", "ddp", 8).memory
