"""Preparing that is stopped: by Ctrl-C, by signals, by another process, by a power cut."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bd3lm.data import Dataset, Tokenizer, prepare
from bd3lm.errors import ExistsError
from tests.reliability.large import sparse_data_set

FILES = ("tokens.bin", "tokens.idx", "manifest.json", "tokenizer.json")
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="signals and pipes of Unix")


def command(*arguments: object) -> list[str]:
    # Started in the background of a shell, these tests would hand on a SIGINT that is ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from bd3lm.cli.prepare import main; main()"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


def started(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """A command that has begun to write its output."""
    running = subprocess.Popen(
        command(*arguments, "--out", folder / "set"), stderr=subprocess.PIPE, text=True
    )
    while not (folder / ".set.partial" / "tokens.bin").exists():
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    return running


def check_stopped(running: subprocess.Popen[str], kind: signal.Signals, folder: Path) -> None:
    before = sorted(p.name for p in folder.iterdir() if p.name != ".set.partial")
    sent = time.monotonic()
    running.send_signal(kind)
    running.communicate(timeout=30)
    assert running.returncode == 128 + kind
    assert time.monotonic() - sent < 10  # less than a second on a quiet machine
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_pipe_that_nobody_writes_to(kind: signal.Signals, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    check_stopped(started(tmp_path, tmp_path / "x.jsonl"), kind, tmp_path)


def test_a_pipe_that_stops(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.txt")
    writer = os.open(tmp_path / "x.txt", os.O_RDWR)
    os.write(writer, b"a text")
    check_stopped(started(tmp_path, tmp_path / "x.txt"), signal.SIGINT, tmp_path)
    os.close(writer)


def test_standard_input_that_stops(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    code = command("-", "--out", tmp_path / "set")
    running = subprocess.Popen(code, stdin=reader, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".set.partial" / "tokens.bin").exists():
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    check_stopped(running, signal.SIGINT, tmp_path)
    os.close(writer)
    os.close(reader)


def test_a_tokenizer_in_the_middle_of_a_long_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Text that only the library can encode, for many seconds."""
    definition = json.loads(tokenizer.json)
    definition["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "slow.json").write_text(json.dumps(definition))
    (tmp_path / "x.txt").write_text("the old house by the river, " * 1_500_000)
    running = started(tmp_path, tmp_path / "x.txt", "--tokenizer", tmp_path / "slow.json")
    time.sleep(0.5)
    check_stopped(running, signal.SIGINT, tmp_path)


@pytest.mark.parametrize("seconds", [0.5, pytest.param(1.5, marks=pytest.mark.slow)])
def test_a_tokenizer_that_is_trained(seconds: float, tmp_path: Path) -> None:
    """While it is given text, and while the library learns merges from it."""
    draw = random.Random(0)
    words = " ".join(f"{draw.randrange(10**9):x}" for _ in range(500_000))
    (tmp_path / "x.txt").write_text(words)
    running = subprocess.Popen(
        command(tmp_path / "x.txt", "--tokenizer", "train:30000", "--out", tmp_path / "set"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert running.stdout is not None
    assert running.stdout.readline().startswith("training a byte-level BPE")
    time.sleep(seconds)
    sent = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, message = running.communicate(timeout=60)
    assert running.returncode == 130
    assert message == "stopped; nothing half-written was kept\n"
    assert time.monotonic() - sent < 10  # less than a second on a quiet machine
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


VERIFIES = """
import signal, sys
from bd3lm.data import Dataset
signal.signal(signal.SIGINT, signal.default_int_handler)
print("opening", flush=True)
{work}
"""


@pytest.mark.parametrize(
    "work",
    ["Dataset(sys.argv[1], verify=True)", "Dataset(sys.argv[1], verify=False).token_counts()"],
)
def test_a_large_data_set_that_is_read_whole(
    work: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Work that would take half a minute."""
    path = sparse_data_set(tmp_path / "set", tokenizer, 6_000_000_000, 3_000_000)
    running = subprocess.Popen(
        [sys.executable, "-c", VERIFIES.format(work=work), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    running.stdout.readline()
    time.sleep(0.3)
    sent = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, message = running.communicate(timeout=30)
    assert time.monotonic() - sent < 10  # less than a second on a quiet machine
    assert message.splitlines()[-1] == "KeyboardInterrupt"


def test_one_output_is_made_by_one_process(tokenizer: Tokenizer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    running = started(tmp_path, tmp_path / "x.jsonl")
    (tmp_path / "y.txt").write_text("a text")
    with pytest.raises(ExistsError, match="is being made by another process"):
        prepare([tmp_path / "y.txt"], tokenizer, tmp_path / "set")
    running.kill()
    running.communicate()
    assert (tmp_path / ".set.partial").exists(), "nothing could remove it"
    prepare([tmp_path / "y.txt"], tokenizer, tmp_path / "set")
    assert Dataset(tmp_path / "set").num_documents == 1
    assert not (tmp_path / ".set.partial").exists()


@pytest.mark.parametrize(
    "count", [1, pytest.param(25, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_killed_and_made_again(count: int, tmp_path: Path) -> None:
    """SIGKILL at random moments: the next preparation gives the same files and removes the rest."""
    lines = (f"the old house of {i} stood by the river " * 20 for i in range(2000))
    (tmp_path / "x.txt").write_text("\n".join(lines))
    words = [tmp_path / "x.txt", "--lines", "--valid-fraction", "0.1", "--out"]

    def contents(out: Path) -> dict[str, bytes]:
        files = (out / side / name for side in ("train", "valid") for name in FILES)
        return {str(file.relative_to(out)): file.read_bytes() for file in files}

    seconds = 0.0
    for name in ("first", "whole"):  # the first also reads what later ones find in memory
        begun = time.monotonic()
        subprocess.run(command(*words, tmp_path / name), check=True, capture_output=True)
        seconds = time.monotonic() - begun
    whole, draw, met = contents(tmp_path / "whole"), random.Random(count), 0
    for attempt in range(count):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        running = subprocess.Popen(
            command(*words, folder / "set"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Half of them aim at the end, where files are synced and renamed.
        time.sleep(draw.uniform(0.8 if attempt % 2 else 0.2, 1.0) * seconds)
        running.kill()
        running.wait()
        if (folder / "set").exists():
            met += 1
        else:
            subprocess.run(command(*words, folder / "set"), check=True, capture_output=True)
        assert contents(folder / "set") == whole
        assert [path.name for path in folder.iterdir()] == ["set"]
        shutil.rmtree(folder)
    assert count < 10 or met < count  # some were killed before they were whole


@pytest.mark.parametrize("where", ["dot", "link", "empty"])
def test_an_output_that_exists_and_is_empty(
    where: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text("a text " * 100)
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    out = {"dot": Path("."), "link": tmp_path / "link", "empty": real}[where]
    prepare([tmp_path / "x.txt"], tokenizer, out, valid_fraction=0.3)
    assert sorted(p.name for p in real.iterdir()) == ["train", "valid"]
    assert Dataset(out / "train").num_documents == 1
    with pytest.raises(ExistsError, match="already exists"):
        prepare([tmp_path / "x.txt"], tokenizer, out)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 file system in a file: (its image, where it is mounted)."""
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
        subprocess.run(
            ["mount", "-o", "loop", str(image), str(mounted)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs root and a system that allows it")
    yield image, mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("split", [None, 0.3])
def test_a_power_cut_after_preparing(
    split: float | None, disk: tuple[Path, Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The image is copied the moment a data set is there, as if the power went off."""
    image, mounted = disk
    (tmp_path / "x.txt").write_text("the old house by the river\n" * 20_000)
    after = tmp_path / "after"
    after.mkdir()
    for attempt in range(5):
        out = mounted / "deep" / f"set{attempt}"
        prepare([tmp_path / "x.txt"], tokenizer, out, lines=True, valid_fraction=split)
        copy = tmp_path / "copy"
        shutil.copyfile(image, copy)
        subprocess.run(["mount", "-o", "loop", str(copy), str(after)], check=True)
        try:
            here = after / "deep" / f"set{attempt}"
            for part in [here] if split is None else [here / "train", here / "valid"]:
                assert Dataset(part, verify=True).num_tokens > 0
        finally:
            subprocess.run(["umount", str(after)], check=True)
