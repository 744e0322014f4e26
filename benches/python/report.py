"""Write the benchmarks' tables into docs/performance.md, each between its markers.

Each benchmark writes ``benches/results/NAME.json`` (``--out``) as {"machine": …, "results": …};
the function of its section turns that into Markdown. A section without a file is left alone.

Run: python benches/python/report.py [SECTION …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; ``head`` holds the titles between bars."""
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def ratio(value: dict[str, Any]) -> str:
    """A median with its extremes."""
    return f"**{value['median']:.1f}×** ({value['low']:.1f}–{value['high']:.1f})"


def where(machine: dict[str, Any]) -> str:
    """One sentence on what ran it."""
    flags = ", ".join(flag.upper().replace("AVX512F", "AVX-512") for flag in machine["flags"])
    return (
        f"{machine['cores']} cores of an {machine['processor']} ({flags}), "
        f"{machine['memory_gb']} GB; Python {machine['python']}, PyTorch {machine['torch']}; "
        f"{machine['date']}."
    )


class Section(NamedTuple):
    """A marker's file in ``benches/results`` and what makes its Markdown."""

    file: str
    render: Callable[[Any], str]


SECTIONS: dict[str, Section] = {}


def put(document: str, name: str, text: str) -> str:
    """``document`` with ``text`` between ``<!-- name -->`` and ``<!-- /name -->``."""
    before, rest = document.split(f"<!-- {name} -->\n")
    after = rest.split(f"<!-- /{name} -->")[1]
    return f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}"


def main() -> None:
    """Write the sections that are named, or all that have a file."""
    document = DOCUMENT.read_text(encoding="utf-8")
    for name in sys.argv[1:] or SECTIONS:
        file = RESULTS / SECTIONS[name].file
        if not file.is_file():
            print(f"{name}: no {file.name}, left as it is")
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        text = f"{where(record['machine'])}\n\n{SECTIONS[name].render(record['results'])}"
        document = put(document, name, text)
    DOCUMENT.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
