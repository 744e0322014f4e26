"""Every code block of the documentation runs, or says in its source why it cannot.

Python blocks of a page share a namespace and run word for word. Commands are parsed by their own
parsers; a block behind ``<!-- run -->`` is also run, with settings of a very small model added. A
block behind ``<!-- not run: REASON -->`` is left out. Pages run in a folder of their own, which
holds a trained run under the names that the pages use.
"""

import os
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

import bd3lm
from bd3lm.data import load_tokenizer, prepare
from tests.integration.conftest import Silent, story

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT)
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*.md")]
    if "```python" in (text := page.read_text(encoding="utf-8")) or "```console" in text
)
SMALL = {
    "bd3lm-train": "--steps 3 --batch-size 4 --seq-len 32 --device cpu --model.width 32 "
    "--model.depth 2 --model.heads 2 --sample.num 1 --sample.length 20 --eval.every 0 "
    "--eval.final-rows 8",
    "bd3lm-sample": "--length 24 --num 1",
}
"""Settings added to commands that are run."""


class Block(NamedTuple):
    """A fenced block of a page, with the comment in front of it."""

    language: str
    text: str
    mark: str
    line: int


def blocks(page):
    """The code blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = r"(?:^ *<!-- (run|not run: [^\n]+?) -->\n)?^( *)```(\w*)[^\n]*\n(.*?)^\2```"
    for found in re.finditer(pattern, text, flags=re.DOTALL | re.MULTILINE):
        mark, indent, language, body = found.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        line = text[: found.start()].count("\n") + 1
        yield Block(language, "\n".join(lines) + "\n", mark or "", line)


def commands(text):
    """Command lines of a console block as words, without a shell's expansions."""
    text = re.sub(r"\\\n\s*", "", text)
    for line in re.findall(r"^\$ (.*)$", text, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        ends = [i for i, word in enumerate(words) if word in ("|", ">", ">>", "&&")]
        yield words[: min(ends, default=len(words))]


def programs():
    """Entry points of the package's commands."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name, target in project["project"]["scripts"].items():
        module, _, function = target.partition(":")
        yield name, getattr(import_module(module), function)


def check_parses(main, words, monkeypatch):
    """A command's own parser takes these words."""
    real = tyro.cli

    def only_parse(*args, **options):
        real(*args, **options)
        raise SystemExit(0)  # content: the command itself is not run

    with monkeypatch.context() as patch:
        patch.setattr(tyro, "cli", only_parse)
        with pytest.raises(SystemExit) as stop:
            main(words)
    assert not stop.value.code, f"refused: {' '.join(words)}"


def check_other(words):
    """A command that is not ours names things that exist."""
    program, rest = words[0], words[1:]
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(rest) <= targets, rest
    elif program in ("python", "pytest"):
        made = ("-", "runs/")  # options, and folders that the command writes
        for path in (word for word in rest if "/" in word and not word.startswith(made)):
            assert (ROOT / path).exists() or "CHECKPOINT" in path, path
    elif program == "pip":
        assert rest[:2] in (["install", "bd3lm"], ["install", "."]), rest
    else:
        raise AssertionError(f"{program}: no command that this test knows")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of very small models of two presets, on a text that is prepared."""
    folder = tmp_path_factory.mktemp("docs")
    text = folder / "text.txt"
    text.write_text("\n".join(story(seed, 60) for seed in range(60)), encoding="utf-8")
    tokenizer = load_tokenizer("default")
    prepare([text], tokenizer, folder / "data", lines=True, valid_fraction=0.1)
    small = {"width": 32, "depth": 2, "heads": 2}
    for name, model in (("demo", small), ("tiny", small | {"cond_width": 16})):
        config = bd3lm.preset(
            name,
            data=str(folder / "data"),
            seq_len=32,
            steps=3,
            batch_size=4,
            device="cpu",
            model=model,
            eval={"every": 0},
            sample={"num": 1, "length": 20},
        )
        bd3lm.train(config, folder / name, reporter=Silent())
    return folder


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_code_blocks_run(page, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name, run in (("demo", "demo"), ("books", "demo"), ("row", "demo"), ("tiny", "tiny")):
        (tmp_path / "runs" / name).symlink_to(trained / run)
    if page.name != "tutorial.md":
        (tmp_path / "runs" / "book").symlink_to(trained / "demo")
        (tmp_path / "book.txt").symlink_to(trained / "text.txt")
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "book").symlink_to(trained / "data")
    ours, namespace, seen = dict(programs()), {}, 0
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.mark.startswith("not run"):
            continue
        if block.language == "python":
            exec(compile(block.text, where, "exec"), namespace)
            seen += 1
        elif block.language == "console":
            for words in commands(block.text):
                seen += 1
                if words[0] == "torchrun":  # executed by tests/reliability/test_ranks.py
                    name, *words = words[words.index("bd3lm") + 1 :]
                    words = [f"bd3lm-{name}", *words]
                if words[0] not in ours:
                    check_other(words)
                    continue
                check_parses(ours[words[0]], words[1:], monkeypatch)
                if block.mark == "run":
                    small = shlex.split(SMALL.get(words[0], ""))
                    if words[0] == "bd3lm-train" and "--data" not in words:
                        small += ["--data", str(trained / "data")]  # not the whole shipped text
                    ours[words[0]]([*words[1:], *small])
        else:
            known = ("", "text", "bibtex", "toml", "json", "rust")
            assert block.language in known, f"{where}: {block.language} is not tested"
    assert seen or "not run" in (ROOT / page).read_text(encoding="utf-8"), page
    capsys.readouterr()
    assert os.getcwd() == str(tmp_path)
