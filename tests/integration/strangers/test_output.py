"""Output as it is: any text, name, terminal and notebook; errors; pictures."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm.cli import compare, prepare, sample
from bd3lm.cli.common import PlainConsole, error_sentence, run
from bd3lm.cli.summary import command as command_line
from bd3lm.cli.summary import duration, facts
from bd3lm.config import TrainConfig
from bd3lm.errors import ConfigError, MissingPackageError
from bd3lm.extras import require
from tests.integration.strangers.common import MAINS, ODD

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
    """Its stream says that it is a terminal, and shows escape codes as they are."""
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
        (PermissionError(13, "Permission denied", "kept/x"), "kept/x: Permission denied"),
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
    for file in (Path(__file__).parents[3] / "python").rglob("*.py"):
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
