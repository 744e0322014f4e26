"""References of the documentation exist: links, anchors, sections, and the pictures' program."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = {".venv", "target", "dist", "runs", "node_modules", "site"}
HOSTED = "../../actions/"
"""Pages that only the host of the repository serves; relative, so that a fork has its own."""


def pages():
    """Every Markdown page of the repository."""
    return sorted(
        page
        for page in ROOT.rglob("*.md")
        if not any(
            part in SKIPPED or (part.startswith(".") and part != ".github")
            for part in page.relative_to(ROOT).parts
        )
    )


def prose(page):
    """A page without its code blocks, comments and code spans."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def anchors(page):
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2", "", text, flags=re.DOTALL | re.MULTILINE)
    found = set(re.findall(r'(?:id|name)="([^"]+)"', text))
    found |= set(re.findall(r"^::: (\S+)", text, flags=re.MULTILINE))  # of the reference
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def links(page):
    """Targets of a page's links and pictures."""
    text = prose(page)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    return found + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link) or link.startswith(HOSTED):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        if anchor and target.suffix == ".md":
            known = anchors(target)
            member = any(anchor.startswith(f"{name}.") for name in known)  # of a documented module
            assert anchor in known or member, f"{link}: no such heading"


def sources():
    """Text files that may cite the documentation, this one left out."""
    kinds = ("*.py", "*.pyi", "*.rs", "*.md", "*.toml", "*.yml")
    rooms = ("python", "rust", "tests", "benches", "docs", "examples", ".github")
    for room in rooms:
        for kind in kinds:
            for path in sorted((ROOT / room).rglob(kind)):
                if path != Path(__file__) and not SKIPPED & set(path.relative_to(ROOT).parts):
                    yield path
    yield from sorted(ROOT.glob("*.md"))
    yield from (ROOT / "Makefile", ROOT / "pyproject.toml")


def numbers(text):
    """Section numbers behind the sign, ends of ranges included: '§2–4, §6.1' has 2, 4 and 6.1."""
    for first, last in re.findall(r"§ ?(\d+(?:\.\d+)?)(?:[–-](\d+(?:\.\d+)?))?", text):
        yield first
        if last:
            yield last


def test_cited_sections_exist():
    page = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?)\.? ", page, flags=re.MULTILINE))
    assert {str(n) for n in range(1, 9)} <= known
    cited = 0
    for path in sources():
        text = path.read_text(encoding="utf-8")
        # A citation may be broken over two lines of a comment.
        text = re.sub(r"\n\s*(?://[/!]?|#)?\s*", " ", text)
        for found in re.findall(r"(?:docs/)?math\.md[^§.;]{0,3}(§[^)\].;]*)", text):
            for number in numbers(found):
                assert number in known, f"{path}: docs/math.md has no §{number}"
                cited += 1
    assert cited > 0


def test_help_cites_no_section():
    """Texts of ``--help`` are docstrings of settings; a reader there has no page at hand."""
    for room in ("config", "cli"):
        for path in sorted((ROOT / "python" / "bd3lm" / room).glob("*.py")):
            assert "§" not in path.read_text(encoding="utf-8"), path


def test_nothing_cites_what_a_stranger_does_not_have():
    absent = re.compile(r"\bMATH\b(?!_)|\bPROTOCOL\b|\bBD3LM_SHARED\b|\.\./shared\b|/work/")
    for path in sources():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not absent.search(line), f"{path}:{number}: {line.strip()}"


def test_every_picture_is_drawn_and_used(tmp_path):
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import pictures
    finally:
        sys.path.remove(str(ROOT / "docs"))
    pictures.main([], tmp_path)
    text = "".join(page.read_text(encoding="utf-8") for page in pages())
    for name in pictures.PICTURES:
        drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in drawn
        assert (pictures.IMAGES / f"{name}.svg").is_file(), name
        assert f"img/{name}.svg" in text, f"{name}: on no page"


def test_paths_that_the_architecture_names_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tree = text.split("```text\n")[1].split("```")[0]
    folders: list[str] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        names = line[indent:].split("  ")[0].split()
        if indent > 20 or not all("." in n or n.endswith("/") for n in names):
            continue  # the line before continues
        folders = folders[: indent // 2]
        for name in names:
            assert (ROOT / "".join(folders) / name).exists(), line
        if names[-1].endswith("/"):
            folders.append(names[-1])
    for path in re.findall(r"`((?:python|rust|tests|docs|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:training|checkpoint|sample|model|data|noise)/[\w./]+)`", text):
        rooms = (ROOT / "python" / "bd3lm", ROOT / "rust" / "bd3lm-core" / "src")
        assert any((room / path).exists() for room in rooms), path


def test_code_of_the_site_fits_its_box():
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for body in re.findall(r"```(?:console|python)\n(.*?)```", text, flags=re.DOTALL):
            for line in body.splitlines():
                assert len(line) <= 80, f"{page}: {line}"


def test_names_of_the_reference_exist():
    from importlib import import_module

    page = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    names = re.findall(r"`bd3lm\.([\w.]+)`", page.split("## ")[0].split(":::")[0])
    assert len(names) > 10
    for name in names:
        module, _, last = f"bd3lm.{name}".rpartition(".")
        assert hasattr(import_module(module), last), name
