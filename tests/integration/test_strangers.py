"""Inputs of people who have not read the code, kind by kind."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bd3lm.cli import compare, evaluate, export, judge, main, prepare, sample, train
from bd3lm.cli.common import PlainConsole, error_sentence, run
from bd3lm.cli.summary import command as command_line
from bd3lm.cli.summary import duration, facts
from bd3lm.config import TrainConfig
from bd3lm.errors import ConfigError, MissingPackageError
from bd3lm.extras import require
from bd3lm_paper import cli as paper

TINY = (
    "--seq-len 32 --batch-size 4 --model.width 32 --model.depth 1 --model.heads 2 --log-every 1 "
    "--eval.every 0 --sample.length 16 --steps 2 --device cpu"
).split()
ODD = "the old [b]house[/b] :key: 1:100:5 [red] [/INST] x[i] 'quoted' [/"
"""Text that rich would read as markup, emoji codes and links."""
SAMPLE = {"text": "a", "ids": [1], "stop": "eos", "nfe": 1, "nfe_paper": 1, "seconds": 0.1}
"""A record of ``bd3lm sample --json``."""
MAINS = {
    "bd3lm-train": train.main,
    "bd3lm-prepare": prepare.main,
    "bd3lm-eval": evaluate.main,
    "bd3lm-sample": sample.main,
    "bd3lm-judge": judge.main,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test waits for a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """A run on prepared data, both below a folder with a space and brackets in its name."""
    root = tmp_path_factory.mktemp("strange") / "my [runs] :key:"
    root.mkdir()
    (root / "data [v2]").symlink_to(corpus)
    train.main(["--data", str(root / "data [v2]"), "--out", str(root / "r [1]"), *TINY])
    return root


@pytest.fixture
def checkpoint(folder):
    return str(folder / "r [1]" / "checkpoint")


def outcome(call, *words):
    """Exit code of a command in this process."""
    try:
        call([str(word) for word in words])
    except SystemExit as stop:
        return stop.code
    return 0


def refused(capsys, call, *words):
    """The one sentence of a command that must refuse its words."""
    capsys.readouterr()
    assert outcome(call, *words) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
    return text


# --- one command, early help ----------------------------------------------------------------------


def test_help_and_refusals_need_no_heavy_import():
    code = """
import sys
from bd3lm.cli.main import COMMANDS, main
lines = [[name, "--help"] for name in COMMANDS] + [["--help"], ["--version"], ["nothing"], [],
    ["train", "--steps", "0"], ["train", "--model.heads", "5"], ["train", "--data", "not there"],
    ["train", "--resume", "--out", "not there"],
    ["sample", "not there"], ["eval", "not there"],
    ["prepare", "x", "--out", "o", "--threads", "0"], ["judge", "not there"],
    ["paper", "table1", "--out", "o", "--seeds", "0"],
    ["compare", "not there"], ["compare", "."], ["export", "not there", "o", "--layout", "hf"]]
for line in lines:
    try:
        main(line)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    assert code == (0 if not line or line[-1].startswith("--") else 2), line
heavy = {"torch", "numpy", "matplotlib", "tokenizers", "datasets", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "command = nothing: must be one of train, prepare, sample" in done.stderr


def test_every_command_has_its_two_names():
    scripts = re.findall(
        r'^(bd3lm\S*) = "bd3lm\.cli\.main:(\w+)"$',
        (Path(__file__).parents[2] / "pyproject.toml").read_text(),
        flags=re.MULTILINE,
    )
    assert len(scripts) == 7
    for name, function in scripts:
        called = getattr(main, function)
        if name != "bd3lm":
            assert called.args == (name.removeprefix("bd3lm-"),)


@pytest.mark.parametrize(
    "words",
    [["tiny", "--steps", "0"], ["--steps", "0", "tiny"], ["--row-eos", "tiny", "--steps=0"]],
)
def test_a_preset_may_stand_anywhere(capsys, words):
    assert "steps = 0: must be" in refused(capsys, train.main, *words)
    assert train._preset_of(words)[0] == "tiny"


def test_a_value_is_no_preset():
    assert train._preset_of(["--steps", "5", "--out", "tiny"])[0] is None
    assert train._preset_of(["--noise.clip", "0.3", "0.8", "small"])[0] == "small"


# --- text and tokenizers as people have them ------------------------------------------------------


def test_one_text_file_works_from_anywhere(tmp_path, capsys, monkeypatch):
    """A lone book, named by a relative path: trained, scored and sampled, also from elsewhere."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    book = " ".join(f"the old house of {i} stood by the river" for i in range(400))
    (here / "book.txt").write_text("\ufeff" + book, encoding="utf-8")
    monkeypatch.chdir(here)
    train.main(["--data", "book.txt", "--out", "run", *TINY])
    capsys.readouterr()
    os.rename(here / "run", elsewhere / "moved")
    (here / "book.txt").unlink()
    monkeypatch.chdir(elsewhere)
    evaluate.main(["moved", "--json"])  # the text is part of the run
    assert json.loads(capsys.readouterr().out)["tokens"] > 100
    sample.main(["moved", "--length", "16", "--prompt", "the old"])
    assert "the old" in capsys.readouterr().out
    train.main(["--out", "moved", "--resume", "--steps", "3"])
    assert "3 steps" in capsys.readouterr().out


def test_prepared_data_is_found_from_any_folder(folder, tmp_path, capsys, monkeypatch):
    """A run that was given relative paths; and the message when the data has moved too."""
    monkeypatch.chdir(folder)
    out = tmp_path / "run"
    train.main(["--data", "data [v2]", "--out", str(out), *TINY])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "moved"
    out.rename(moved)
    evaluate.main(["moved", "--json"])
    scored = json.loads(capsys.readouterr().out)
    train.main(["--out", "moved", "--resume", "--steps", "3"])
    capsys.readouterr()
    data = folder / "data [v2]"
    elsewhere = folder / "data"
    data.rename(elsewhere)
    try:
        sentence = refused(capsys, evaluate.main, "moved")
        assert f" no {data}/valid; name it with --data" in sentence
        evaluate.main(["moved", "--json", "--data", str(elsewhere)])
        assert json.loads(capsys.readouterr().out)["tokens"] == scored["tokens"]
        more = ["--out", "moved", "--resume", "--steps", "4"]
        sentence = refused(capsys, train.main, *more)
        assert "name the place where the same data is now with --data" in sentence
        train.main([*more, "--data", str(elsewhere)])
        assert "4 steps" in capsys.readouterr().out
    finally:
        elsewhere.rename(data)


def test_text_as_people_have_it(tmp_path, capsys):
    """One bad record costs one record, counted and shown; --strict refuses it."""
    lines = [
        '{"text": "the old house", "score": NaN, "meta": {"lang": "en"}}',
        '{"text": null, "meta": {"lang": "en"}}',
        '{"text": "half \\ud83d of an emoji", "meta": {"lang": "en"}}',
        '{"text": "it says <|mask|> and [MASK]", "meta": {"lang": "en"}}',
        '{"text": "cut off',
        '{"text": "la vieille maison", "meta": {"lang": "fr"}}',
        '{"text": 7, "meta": {"lang": "en"}}',
    ]
    file = tmp_path / "x.ndjson"
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    words = [file, "--where", "meta.lang=en"]
    prepare.main([*map(str, words), "--out", str(tmp_path / "o")])
    shown = capsys.readouterr().out
    assert "3 documents" in shown
    assert "1 with half a surrogate pair" in shown
    records = json.loads((tmp_path / "o" / "manifest.json").read_text())["records"]
    counts = {name: records[name] for name in ("read", "filtered", "null", "bad", "repaired")}
    assert counts == {"read": 7, "filtered": 1, "null": 1, "bad": 2, "repaired": 1}
    sentence = refused(capsys, prepare.main, *words, "--out", tmp_path / "s", "--strict")
    assert "record 5" in sentence


def test_a_tokenizer_as_people_have_it(tmp_path, capsys, tokenizer):
    """Dropout left on, a hole among the ids, one special token, another name of the mask."""
    definition = json.loads(tokenizer.json)
    model = definition["model"]
    model["dropout"] = 0.3
    kept = [token for token in definition["added_tokens"] if token["id"] == tokenizer.eos_id]
    last = max(model["vocab"].values())
    kept.append(dict(kept[0], id=last + 7, content="<|mdm_mask|>"))
    model["vocab"] = {k: v for k, v in model["vocab"].items() if v != tokenizer.mask_id}
    model["vocab"]["<|mdm_mask|>"] = last + 7
    (tmp_path / "t.json").write_text(json.dumps(definition | {"added_tokens": kept}))
    (tmp_path / "t.txt").write_text("the old house stood by the river\n" * 50)
    words = [str(tmp_path / "t.txt"), "--tokenizer", str(tmp_path / "t.json"), "--out"]
    contents = []
    for name in "ab":
        prepare.main([*words, str(tmp_path / name)])
        contents.append((tmp_path / name / "tokens.bin").read_bytes())
    assert contents[0] == contents[1]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["mask_id"], manifest["vocab_size"]) == (last + 7, last + 8)
    assert manifest["bos_id"] == manifest["eos_id"] == tokenizer.eos_id


# --- output as it is ------------------------------------------------------------------------------


def test_text_is_printed_as_it_is(capsys):
    facts(PlainConsole(), ODD, {"name": ODD * 5, "": ODD})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [ODD, f"name  {ODD * 5}", f"      {ODD}"]


def test_names_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("[/old]").mkdir(parents=True)  # two folders: rich would read a closing tag
    Path("[/old]/[red]a :key:.txt").write_text(ODD)
    prepare.main(["[/old]/[red]a :key:.txt", "--out", "[/old]/v[1]o[b]"])
    assert "Prepared [/old]/v[1]o[b]\n" in capsys.readouterr().out
    assert Path("[/old]/v[1]o[b]/manifest.json").exists()


def test_a_sample_is_written_byte_for_byte(checkpoint, capsys):
    words = [checkpoint, "--length", "32", "--prompt", ODD[:30], "--device", "cpu"]
    sample.main([*words, "--json"])
    text = json.loads(capsys.readouterr().out)["text"]
    sample.main(words)
    title, rest = capsys.readouterr().out.split("\n", 1)
    assert "sample 1: " in title
    assert rest == text + "\n"
    assert rest.startswith(ODD[:30])


def test_suggested_commands_run(folder, capsys):
    """Commands printed after training, run in a folder whose name a shell would split."""
    summary = json.loads((folder / "r [1]" / "summary.json").read_text())
    from bd3lm.cli.summary import training_summary

    training_summary(PlainConsole(), summary, folder / "r [1]")
    printed = capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line.lstrip("next ").startswith("bd3lm-")]
    assert len(commands) == 2
    for line in commands:
        name, *words = shlex.split(line.lstrip("next "))
        MAINS[name](words)
    assert "Scored " in capsys.readouterr().out


def test_commands_are_quoted():
    assert command_line("bd3lm-eval", Path("a b/[c]")) == "bd3lm-eval 'a b/[c]'"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["compare", "RUN"]])
def test_a_closed_pipe_is_silent(folder, words, tmp_path):
    words = [str(folder / "r [1]") if w == "RUN" else w for w in words]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "bd3lm", *words],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        timeout=120,
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_any_encoding_of_the_terminal(tmp_path, encoding):
    (tmp_path / "тест.txt").write_text("the old house")
    done = subprocess.run(
        [sys.executable, "-m", "bd3lm", "prepare", "тест.txt", "--out", "вых"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        cwd=tmp_path,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"Prepared \u0432\u044b\u0445" in done.stdout


def test_a_notebook_gets_lines(monkeypatch):
    """Terminal stream that shows escape codes as they are."""
    stream = type("OutStream", (io.StringIO,), {"isatty": lambda self: True})
    stream.__module__ = "ipykernel.iostream"
    monkeypatch.setattr("sys.stdout", stream())
    console = PlainConsole()
    assert not console.is_terminal
    console.print("a line")
    assert sys.stdout.getvalue() == "a line\n"


def test_progress_of_a_run_survives_a_closed_pipe():
    from bd3lm.cli.progress import RichReporter

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    console = PlainConsole()
    console.file = Closed()
    with RichReporter(console, 3) as reporter:
        reporter.note("a note")
        for step in (1, 2, 3):
            reporter.step(step, {"loss": 1.0, "tokens_per_second": 2.0, "mfu": 0.1})


def test_lines_of_progress_say_something(capsys):
    from bd3lm.cli.progress import LINES, RichReporter

    with RichReporter(PlainConsole(), 1000) as reporter:
        for step in range(1, 1001):
            metrics = {"loss": 1000.0 / step, "tokens_per_second": 2.0, "mfu": 0.1}
            reporter.step(step, metrics if step >= 10 else {})
    lines = capsys.readouterr().out.splitlines()
    assert LINES <= len(lines) <= LINES + 1
    assert all(re.fullmatch(r"step \d+/1000  loss \d.*tok/s  MFU 10%.*", line) for line in lines)
    assert lines[-1].startswith("step 1000/1000  loss 1.000")


def test_a_long_run_is_announced(capsys, monkeypatch):
    from bd3lm.cli import progress

    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.RichReporter(PlainConsole(), 1000) as reporter:
        for step in range(1, 6):
            reporter.step(step, {})
    assert "about 16 h 36 min to the last step" in capsys.readouterr().out


def test_times_have_two_units():
    assert [duration(s) for s in (0.2, 59.6, 3600, 90_000)] == ["0 s", "1 min", "1 h", "1 d 1 h"]


# --- errors ---------------------------------------------------------------------------------------


class PanicException(BaseException):
    """Error of the extension that is no Exception."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PanicException("index out of bounds"), "a bug of bd3lm, or a damaged tokenizer"),
        (MemoryError(), "out of memory; use a smaller --batch-size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (RecursionError("maximum recursion depth"), "nested too deeply"),
        (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"), "not valid UTF-8"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
        (IsADirectoryError(21, "Is a directory", b"\xff"), "Is a directory"),
    ],
)
def test_what_input_or_machine_cause_is_one_sentence(capsys, error, sentence):
    def fails():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(fails)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert sentence in text
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1


def test_a_bug_shows_where_it_is_and_asks_for_a_report(capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: int("one"))
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-2].startswith("ValueError")
    assert lines[-1] == "This is a bug of bd3lm. Please report it with the lines above."
    assert error_sentence(KeyError("x")) is None


def test_ctrl_c_while_importing_is_one_line(tmp_path):
    """A module that is interrupted imitates a slow import."""
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from bd3lm.cli import main
main.COMMANDS["train"] = ("interrupted", "")
main.main(["train"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_a_refusal_has_parts_and_can_be_renamed():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(block_size=7)
    error = caught.value
    assert (error.field, error.value, error.allowed) == (
        "block-size",
        7,
        "a divisor of seq-len = 128",
    )
    assert str(error.renamed("S")) == "S = 7: must be a divisor of seq-len = 128"
    assert str(ConfigError("out", None, "a folder")) == "out (not given): must be a folder"


def test_every_refusal_says_must_be_once():
    """No sentence of ``check`` begins with its own "must"."""
    import ast

    found = 0
    for file in (Path(__file__).parents[2] / "python").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "check",
                "ConfigError",
            ):
                last = node.args[-1]
                if isinstance(last, ast.JoinedStr):
                    last = last.values[0]
                if isinstance(last, ast.Constant) and isinstance(last.value, str):
                    found += 1
                    assert not last.value.startswith(("must", "needs ", "goes ")), last.value
    assert found > 60


# --- where output may go --------------------------------------------------------------------------


@pytest.mark.parametrize("split", [[], ["--valid-fraction", "0.5"]])
def test_prepare_writes_into_an_empty_folder(tmp_path, monkeypatch, split):
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(f"the old house {i}" for i in range(20))
    Path("t.txt").write_text(lines)
    Path("here").mkdir()
    Path("real").mkdir()
    Path("link").symlink_to("real")
    inside = Path("here").stat().st_ino
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../link", "../new"):
        prepare.main(["../t.txt", "--lines", *split, "--out", out])
        names = {"train", "valid"} if split else {"manifest.json", "tokens.bin"}
        assert names <= set(os.listdir(out))
        assert not any(name.startswith(".") for name in os.listdir(out))
    assert Path(".").stat().st_ino == inside
    assert Path("../link").is_symlink()
    assert not [name for name in os.listdir("..") if name.startswith(".")]


def test_outputs_that_cannot_be_made(tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("the old house")
    assert "already exists" in refused(capsys, prepare.main, text, "--out", text)
    assert "is a file" in refused(capsys, train.main, "--out", text, *TINY)
    assert "/proc/x1" in refused(capsys, prepare.main, text, "--out", "/proc/x1/y")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "already exists" in refused(capsys, prepare.main, text, "--out", tmp_path / "full")


# --- small doors ----------------------------------------------------------------------------------


def drawn(capsys, *words):
    capsys.readouterr()
    sample.main([str(word) for word in words])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_hole_is_filled_and_the_rest_stays(checkpoint, capsys):
    words = [checkpoint, "--hole", "___", "--hole-tokens", "3", "--json", "--num", "2"]
    records = drawn(capsys, *words, "--prompt", "the ___ stood by ___ river")
    for record in records:
        if record["stop"] == "length":
            assert re.fullmatch(r"the.* stood by.* river", record["text"], flags=re.DOTALL)
    assert any(record["stop"] == "length" for record in records)
    assert "must be a text that holds the hole" in refused(
        capsys, sample.main, *words, "--prompt", "the old"
    )


def test_prompts_come_from_a_file_or_a_pipe(checkpoint, capsys, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("the old\nby the river\n")
    (tmp_path / "p.jsonl").write_text('"the\\nold"\n')
    same = [checkpoint, "--length", "24", "--json", "--num", "2", "--prompts"]
    texts = [record["text"] for record in drawn(capsys, *same, tmp_path / "p.txt")]
    assert [text.startswith("the old") for text in texts] == [True, True, False, False]
    assert all(text.startswith("by the river") for text in texts[2:])
    assert drawn(capsys, *same, tmp_path / "p.jsonl")[0]["text"].startswith("the\nold")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the old\nby the river\n")))
    assert [record["text"] for record in drawn(capsys, *same, "-")] == texts
    assert "must be a file with at least one line" in refused(
        capsys, sample.main, *same, os.devnull
    )


def test_a_forbidden_word_is_not_drawn(checkpoint, capsys, tokenizer):
    words = [checkpoint, "--num", "4", "--json", "--length", "32"]
    seen = [token for record in drawn(capsys, *words) for token in record["ids"]]
    token = next(t for t in seen if re.fullmatch(" [a-z]{3,}", tokenizer.decode([t])))
    word = tokenizer.decode([token]).strip()
    after = drawn(capsys, *words, "--forbidden", word, seen[0])
    assert not {token, seen[0]} & {t for record in after for t in record["ids"]}
    assert "forbidden = 'not one token': must be one token" in refused(
        capsys, sample.main, *words, "--forbidden", "not one token"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", "caf\udce9 old"], "must be valid UTF-8 text"),
        (["--prompt", "the <|mask|> mill"], "'the <|mask|> mill': must be a text without the mask"),
        (["--prompt", "x", "--prompts", "p"], "prompts = p: must be given without --prompt"),
        (["--save-live", "x.mp4"], "save-live = x.mp4: must be a .html or .gif file"),
        (["--fps", "-1"], "fps = -1.0: must be"),
        (["--seed", str(2**64)], f"seed = {2**64}: must be in ["),
        (["--temperature", "nan"], "temperature = nan: must be a finite float32"),
        (["--steps", "2", "--threshold", "0.5"], "steps, threshold = set: must be one at a time"),
    ],
)
def test_sample_refuses_in_words(checkpoint, capsys, words, sentence):
    assert sentence in refused(capsys, sample.main, checkpoint, *words)


def test_eval_finds_what_is_meant(folder, checkpoint, corpus, capsys, tmp_path):
    evaluate.main([checkpoint, "--json"])  # the run's own validation data
    own = json.loads(capsys.readouterr().out)
    evaluate.main([checkpoint, "--json", "--data", str(corpus)])  # a folder with its valid/
    assert json.loads(capsys.readouterr().out) == own
    text = tmp_path / "s.jsonl"
    text.write_text('{"sentence": "the old house stood by the river"}\n')
    evaluate.main([checkpoint, "--json", "--data", str(text), "--text-field", "sentence"])
    assert json.loads(capsys.readouterr().out)["tokens"] > 3
    for words in (["--batch-size", "-3"], ["--batch-size", "0"], ["--repeats", "0"]):
        assert "must be at least 1" in refused(capsys, evaluate.main, checkpoint, *words)


def test_text_goes_with_the_tokenizer_of_the_data(folder, corpus, capsys, tmp_path):
    text = tmp_path / "t.jsonl"
    text.write_text('{"sentence": "the old house stood by the river and no one knew"}\n' * 20)
    small = tmp_path / "small"
    prepare.main(
        [str(text), "--text-field", "sentence", "--tokenizer", "train:300", "--out", str(small)]
    )
    data = ["--data", str(small), "--valid", str(text), "--text-field", "sentence"]
    train.main([*data, *TINY, "--out", str(tmp_path / "run")])
    assert "Trained in" in capsys.readouterr().out
    sentence = refused(
        capsys, train.main, "--data", corpus, "--tokenizer", small / "tokenizer.json", *TINY,
        "--out", tmp_path / "other",
    )  # fmt: skip
    assert "must be left out or the tokenizer that" in sentence
    assert "was prepared with" in sentence


def test_shape_and_tokenizer_come_from_init_from(folder, checkpoint, corpus, capsys, tmp_path):
    others = [w for i, w in enumerate(TINY) if not TINY[max(i - 1, 0)].startswith("--model")]
    others = [word for word in others if not word.startswith("--model")]
    out = tmp_path / "run"
    train.main(["--init-from", checkpoint, "--data", str(corpus), "--out", str(out), *others])
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["width"] == 32
    assert config["model"]["heads"] == 2


def test_samples_are_judged_from_a_pipe(checkpoint, capsys, monkeypatch, tmp_path):
    records = drawn(capsys, checkpoint, "--json", "--num", "2", "--length", "16")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    judge.main(["-", "--json"])
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    for text, sentence in (
        ("[1]\n", "line 1: not a JSON object"),
        ('{"text": "x"}\n', "line 1: no ids, stop"),
        (json.dumps(records[0] | {"ids": ["x"]}) + "\n", "line 1: ids has another type"),
        ("[" * 100_000, "line 1: not a JSON object"),
        ("", "must be a file with at least one sample"),
    ):
        (tmp_path / "s.jsonl").write_text(text)
        assert sentence in refused(capsys, judge.main, tmp_path / "s.jsonl")


def test_runs_are_compared(folder, capsys, tmp_path):
    run_folder, picture = folder / "r [1]", tmp_path / "c.png"
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "lo')
    compare.main([str(run_folder), str(stopped), "--out", str(picture)])
    head, first, second, wrote = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "system", "S", "L"]
    assert first.startswith(str(run_folder))
    assert "5.5" in second.split()
    assert wrote == f"wrote {picture}"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "must be a new file, without --force" in refused(
        capsys, compare.main, run_folder, "--out", picture
    )
    assert "is not a run" in refused(capsys, compare.main, tmp_path, "--out", tmp_path / "x.png")


# --- watching -------------------------------------------------------------------------------------


def test_forwards_are_recorded_and_saved(checkpoint, capsys, tmp_path):
    page = tmp_path / "live.html"
    prompt = "</script> <!--<script> the"
    words = [checkpoint, "--length", "24", "--prompt", prompt, "--save-live", str(page)]
    sample.main([*words, "--json", "--num", "2"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    text = page.read_text(encoding="utf-8")
    assert text.count("<script>") == text.count("</script>") == 1  # the page's own
    assert "<!--" not in text
    assert "http" not in text
    frames = json.loads(re.search(r"const frames = (.*);", text)[1])
    last = [frame for frame in frames if "ended by" in frame["caption"]]
    assert ["".join(piece[0] for piece in frame["pieces"]) for frame in last] == [
        record["text"] for record in records
    ]
    kinds = {piece[1] for frame in frames for piece in frame["pieces"]}
    assert {"given", "masked", "new"} <= kinds
    assert any("p = " in frame["caption"] for frame in frames)


def test_a_recording_is_a_picture_too(checkpoint, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "live.gif"
    sample.main([checkpoint, "--length", "12", "--save-live", str(file)])
    assert image.open(file).n_frames > 4


def test_live_text_is_the_sample(checkpoint, capsys):
    words = [checkpoint, "--length", "24", "--device", "cpu"]
    text = drawn(capsys, *words, "--json")[0]["text"]
    sample.main([*words, "--live"])
    assert capsys.readouterr().out == text + "\n"


# --- sharing the machine --------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="masks of Linux")
def test_threads_follow_affinity_and_quota():
    code = """
import os
os.environ.pop("OMP_NUM_THREADS", None)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from bd3lm.data.prepare import available_threads
from bd3lm.device import resolve_device
assert available_threads() == 1
torch.set_num_threads(2)  # as in a container whose quota is smaller than its mask
resolve_device("cpu")
assert torch.get_num_threads() == 1
os.environ["OMP_NUM_THREADS"] = "2"
torch.set_num_threads(2)
resolve_device("cpu")
assert torch.get_num_threads() == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_streams_watch_for_busy_cores_too(checkpoint, monkeypatch):
    from bd3lm import load_checkpoint
    from bd3lm.model.threads import _State

    assert _State.users == 0
    events = load_checkpoint(checkpoint).stream("the", length=16)
    next(events)
    assert _State.users == 1
    events.close()
    assert _State.users == 0


# --- settings before work -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sample.forbidden", "not one token"], "forbidden = 'not one token': must be one token"),
        (["--sample.forbidden", "99999999"], "forbidden = 99999999: must be ids in [0, "),
        (["--block-size", "32", "--sample.length", "64"], "length = 64: must be at most 32"),
        (["--system", "sedd", "--sample.threshold", "0.5"], "must be left out for sedd"),
    ],
)
def test_sampling_settings_are_checked_before_training(corpus, capsys, tmp_path, words, sentence):
    out = tmp_path / "run"
    base = [w for w in TINY if w not in ("--sample.length", "16")]
    line = ["--data", corpus, "--out", out, *base, *words]
    assert sentence in refused(capsys, train.main, *line)
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "eval", "judge"])
def test_data_is_verified_where_that_is_wanted(folder, command, capsys, tmp_path, monkeypatch):
    from bd3lm.data import store

    seen = []
    real = store._core.TokenStore.open
    fake = SimpleNamespace(open=lambda path, verify: seen.append(verify) or real(path, verify))
    monkeypatch.setattr(store._core, "TokenStore", fake)
    data = str(folder / "data [v2]")
    (tmp_path / "s.jsonl").write_text(json.dumps(SAMPLE | {"text": "the old house"}))
    lines = {
        "train": ["--data", data, "--out", str(tmp_path / "run"), *TINY],
        "eval": [str(folder / "r [1]"), "--rows", "2"],
        "judge": [str(tmp_path / "s.jsonl"), "--reference", f"{data}/valid"],
    }
    MAINS[f"bd3lm-{command}"]([*lines[command], "--verify"])
    assert seen
    assert set(seen) == {True}


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "svg", "nothing"])
def test_pictures_leave_pyplot_and_the_environment_alone(backend):
    """Notebooks name a backend that the environment of a command may not have."""
    code = """
import os, sys
sys.modules["matplotlib_inline"] = None  # not installed
backend = os.environ["MPLBACKEND"]
from bd3lm.plots import plot_loss
figure = plot_loss([{"step": 1, "loss": 2.0}, {"step": 20000, "loss": 1.0}], "title [b]")
assert type(figure).__mro__[1].__name__ == "Figure"
assert figure._repr_png_()[:4] == b"\\x89PNG"
assert "matplotlib.pyplot" not in sys.modules
assert os.environ["MPLBACKEND"] == backend
import matplotlib
assert backend != "svg" or matplotlib.get_backend() == "svg"
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MPLBACKEND": backend},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_package_names_its_extra(monkeypatch, capsys, folder, tmp_path):
    with pytest.raises(MissingPackageError, match=r"pip install 'bd3lm\[plots\]'.*'\.\[plots\]'"):
        require("no_such_package", "plots", "a picture")
    from bd3lm import plots

    monkeypatch.setattr(plots, "_import", lambda name: require("no_such_package", "plots", name))
    plots._figure_class.cache_clear()
    compare.main([str(folder / "r [1]"), "--out", str(tmp_path / "c.png")])
    assert "no picture: " in capsys.readouterr().out
    plots._figure_class.cache_clear()


# --- all settings of all commands -----------------------------------------------------------------

NUMBERS = st.sampled_from(
    "-1 0 1 2 3 7 -9999999999 18446744073709551616 1e39 -1e-300 nan inf -inf 0.5 1e-9 1.5 x".split()
)
WORDS = st.sampled_from(["", "x", "[b]", "auto", "\udce9", "None", "../nowhere", "-1", "True"])


def options_of(kind, prefix=""):
    """Options of an argument dataclass: name, and whether it is a switch."""
    import typing

    found = []
    for name, hint in typing.get_type_hints(kind).items():
        option = f"--{prefix}{name.replace('_', '-')}"
        inner = [hint, *typing.get_args(hint)]
        nested = [h for h in inner if dataclasses.is_dataclass(h)]
        if nested:
            below = nested[0].__name__ in ("TrainConfig",) or option == "--draw"
            found += options_of(nested[0], "" if below else f"{prefix}{name}.")
        else:
            found.append((option, hint is bool or inner[0] is bool))
    return found


def lines_of(kind, harmless):
    """Command lines: one to three options with odd values."""
    options = [o for o in options_of(kind) if o[0] not in harmless]
    value = st.one_of(NUMBERS, WORDS)
    one = st.sampled_from(options).flatmap(
        lambda o: st.just([o[0]]) if o[1] else value.map(lambda v: [f"{o[0]}={v}"])
    )
    return st.lists(one, min_size=1, max_size=3).map(lambda parts: list(chain(*parts)))


def check_line(capsys, call, words):
    """Exit 0, or 2 with one sentence or the parser's frame; never a traceback."""
    capsys.readouterr()
    code = outcome(call, *words)
    text = capsys.readouterr().err
    assert code in (0, 2), (words, text[-2000:])
    assert "Traceback" not in text, words
    if code == 2:
        assert text.startswith("error: ") or "For full helptext" in text, text


EXAMPLES = settings(  # more of them in `make check-slow`
    max_examples=int(os.environ.get("BD3LM_EXAMPLES", "8")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@EXAMPLES
@given(words=lines_of(train.TrainArgs, {"--out", "--resume"}))
def test_any_setting_of_train(words, corpus, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("any") / "run"
    base = [*TINY, "--data", str(corpus), "--out", str(out), "--eval.rows", "2"]
    # `steps` and sizes that are right would take minutes: accepted ones give a small run.
    check_line(capsys, train.main, [*base, *words])


@EXAMPLES
@given(words=lines_of(sample.SampleArgs, {"--checkpoint", "--live", "--save-live"}))
def test_any_setting_of_sample(words, checkpoint, capsys):
    check_line(capsys, sample.main, [checkpoint, "--length", "12", *words])


@EXAMPLES
@given(words=lines_of(evaluate.EvalArgs, {"--checkpoint"}))
def test_any_setting_of_eval(words, checkpoint, capsys, tmp_path_factory):
    text = tmp_path_factory.getbasetemp() / "any.txt"
    text.write_text("the old house stood by the river")
    check_line(capsys, evaluate.main, [checkpoint, "--data", str(text), *words])


@EXAMPLES
@given(words=lines_of(prepare.PrepareArgs, {"--inputs", "--out"}))
def test_any_setting_of_prepare(words, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("any")
    (folder / "t.txt").write_text("the old house\nstood by the river")
    check_line(capsys, prepare.main, [str(folder / "t.txt"), "--out", str(folder / "o"), *words])


@EXAMPLES
@given(words=lines_of(judge.JudgeArgs, {"--samples"}))
def test_any_setting_of_judge(words, tmp_path_factory, capsys):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text(json.dumps(SAMPLE) + "\n")
    check_line(capsys, judge.main, [str(file), *words])


@EXAMPLES
@given(words=lines_of(compare.CompareArgs, {"--runs", "--out"}))
def test_any_setting_of_compare(words, folder, tmp_path_factory, capsys):
    picture = tmp_path_factory.mktemp("any") / "c.png"
    check_line(capsys, compare.main, [str(folder / "r [1]"), "--out", str(picture), *words])


@EXAMPLES
@given(words=lines_of(export.ExportArgs, {"--checkpoint", "--out"}))
def test_any_setting_of_export(words, checkpoint, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("any") / "o"
    check_line(capsys, export.main, [checkpoint, str(out), "--layout", "bd3lm", *words])


@EXAMPLES
@given(words=lines_of(paper.PaperArgs, {"--tables", "--out", "--page"}))
def test_any_setting_of_paper(words, tmp_path_factory, capsys):
    out = str(tmp_path_factory.mktemp("any") / "o")
    check_line(capsys, paper.main, ["table9", "--scale", "smoke", "--out", out, *words])


# --- no waiting for nothing -----------------------------------------------------------------------


def test_a_hub_that_does_not_answer_is_tried_once(monkeypatch):
    from huggingface_hub import constants

    from bd3lm import hub

    attempts = []

    def refused_connection(address, timeout):
        attempts.append((address, timeout))
        raise OSError("Network is unreachable")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in hub.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub.socket, "create_connection", refused_connection)
    for _ in range(3):
        hub.connect()
    assert len(attempts) == 1
    assert constants.HF_HUB_OFFLINE
    assert hub.reason(RuntimeError("x")) == "offline, and not in the local cache"


def test_a_tokenizer_of_the_hub_is_one_sentence_offline(capsys, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("the old house")
    sentence = refused(
        capsys, prepare.main, text, "--out", tmp_path / "o", "--tokenizer", "no-one/nothing"
    )
    assert sentence.endswith("(offline, and not in the local cache)\n")


def test_the_final_scoring_has_a_size(corpus, capsys, tmp_path):
    out = tmp_path / "run"
    train.main([*TINY, "--data", str(corpus), "--out", str(out), "--eval.final-rows", "2"])
    assert "Trained in" in capsys.readouterr().out
    assert 0 < json.loads((out / "summary.json").read_text())["val_tokens"] <= 2 * 32


# --- saying what things are -----------------------------------------------------------------------


def test_sources_are_named():
    """The paper and its reproduction by title, authors and link; the shipped texts by source."""
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "Block Diffusion: Interpolating Between Autoregressive and" in readme
    assert "https://arxiv.org/abs/2503.09573" in readme
    results = (root / "docs" / "results.md").read_text(encoding="utf-8")
    for text in (readme, results):
        assert "Kordas" in text
    notice = (root / "NOTICE").read_text(encoding="utf-8")
    for file in ("default_corpus.jsonl.xz", "tokenizer.json"):
        assert (root / "python/bd3lm/assets" / file).is_file()
        assert file in notice
    settings = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert '"NOTICE"' in settings
