"""Pages of the site that live at the root of the repository, and links that leave docs/.

A hook of mkdocs (see mkdocs.yml). On the repository's own pages the files are read as they are.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages outside docs/ and the names that they have on the site."""

LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that live at the root."""
    for name, uri in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=relink(text, name, uri)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make the links of a page those of the site."""
    if page.file.src_uri in ROOT_PAGES.values():
        return markdown
    source = f"docs/{page.file.src_uri}"
    return relink(markdown, source, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Show the cross-references of docstrings as plain names."""
    return re.sub(r":(?:class|func|meth|data|mod|attr):<code>~?", "<code>", html)


def relink(text: str, source: str, uri: str) -> str:
    """``text`` with its links made those of the site; a link to code becomes its name.

    Args:
        text: Markdown whose links are relative to ``source``.
        source: path of the page in the repository.
        uri: path of the page on the site.
    """

    def replace(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in ROOT_PAGES:
            place = ROOT_PAGES[path]
        elif path.startswith("docs/") and not path.endswith(".py"):
            place = path.removeprefix("docs/")
        else:
            return label if label.startswith("`") else f"{label} (`{path}`)"
        return f"[{label}]({posixpath.relpath(place, posixpath.dirname(uri) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(p if p.startswith("```") else LINK.sub(replace, p) for p in parts)
