"""Files for maintainers agree with the repository: versions, make targets, the commit rule."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CARGO = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
VERSION = re.findall(r'^version = "(.*)"$', CARGO, flags=re.MULTILINE)[0]


def commit_rule():
    """The program behind the commit-msg hook."""
    spec = importlib.util.spec_from_file_location(
        "commit_subject", ROOT / ".github" / "commit_subject.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("attention: key the mask cache by shape\n\nOne place knows masks.\n", None),
        ("Merge branch 'main'", None),
        ("data/store: verify files on open", None),
        ("Attention: key the cache", "must read"),
        ("fix the cache", "must read"),
        ("attention: " + "x" * 62, "at most 72"),
        ("attention: key the cache\nbecause", "second line"),
    ],
)
def test_commit_rule(message, fault):
    found = commit_rule().fault(message)
    assert (found is None) == (fault is None)
    assert fault is None or fault in found


def test_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {VERSION}\n" in citation
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{VERSION}] - 20" in changelog or ("## [Unreleased]" in changelog)
    assert VERSION in changelog


def test_workflows_name_targets_and_files_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for workflow in workflows:
        text = workflow.read_text(encoding="utf-8")
        for line in re.findall(r"make ((?:[a-z-]+ ?)+)$", text, flags=re.MULTILINE):
            assert set(line.split()) <= targets, f"{workflow.name}: make {line}"
        for name in re.findall(r"uses: \./(\S+)", text):
            assert (ROOT / name).is_file(), f"{workflow.name}: {name}"


def test_every_target_says_what_it_does():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split()
    described = set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE))
    assert set(phony) == described
