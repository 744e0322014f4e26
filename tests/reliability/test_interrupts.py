"""Preparing that is stopped: by Ctrl-C, by signals, by another process, by a power cut."""

from __future__ import annotations

import json
import os
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
