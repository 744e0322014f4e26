"""Trainers that are killed, stopped or started twice; readers during a write."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.native import read_meta
from bd3lm.checkpoint.sharded import ShardFiles
from bd3lm.checkpoint.steps import find_checkpoint, read_checkpoint
from bd3lm.config import to_dict
from bd3lm.errors import InterruptedRunError
from bd3lm.training import read_metrics
from bd3lm.training.interrupt import immediate
from tests.reliability.test_disk import save, saved
from tests.reliability.zygote import Zygote
from tests.unit.test_remote_data import PIECE, cut_into_pieces


@pytest.fixture(scope="module")
def zygote():
    server = Zygote()
    yield server
    server.close()


@pytest.fixture(scope="module")
def long(small):
    """Long enough to be met at any moment: a save every second step."""
    return dataclasses.replace(small, steps=60, checkpoint_every=2)


@pytest.fixture(scope="module")
def whole(zygote, long, tmp_path_factory):
    """The run that nothing interrupts, and how long it takes."""
    root = tmp_path_factory.mktemp("whole")
    for name in ("first", "run"):  # the first also reads files that later ones find in memory
        begun = time.perf_counter()
        number = zygote.start(to_dict(long), root / name, root / "log")
        assert zygote.wait(number) == 0, (root / "log").read_text()
    return root / "run", time.perf_counter() - begun


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Averaged weights, and all that the last checkpoint is resumed from, whole."""
    meta = read_meta(find_checkpoint(run))
    opened = meta.training()
    if isinstance(opened, ShardFiles):
        state = {name: torch.empty_like(t, device="cpu") for name, t in opened.tensors.items()}
        opened.fill(state)
    else:
        state = opened.load()
    return state | meta.tensors("model.safetensors").load()


def assert_same_run(a: Path, b: Path) -> None:
    """The same weights, moments, state and losses, bit for bit."""
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    first, second = (
        [(m["step"], m["loss"]) for m in read_metrics(run / "metrics.jsonl") if "loss" in m]
        for run in (a, b)
    )
    assert first == second
    validations = [m for m in read_metrics(b / "metrics.jsonl") if "val_nelbo" in m]
    assert len(validations) == 1
    values = [json.loads((run / "summary.json").read_text())["val_nelbo"] for run in (a, b)]
    assert values[0] == values[1]


IN_BACKGROUND = """
from bd3lm.training import trainer
from bd3lm.training.saver import Saver
trainer.Saver = lambda background: Saver(background=True)
"""
"""Writes checkpoints in a thread, as with an accelerator."""


def interrupted_runs(zygote, long, whole, tmp_path, count, number, seed, patch=""):
    """Runs that get a signal at a random moment, and are resumed until they end."""
    reference, seconds = whole
    draw = random.Random(seed)
    left_running = 0
    for index in range(count):
        out, log = tmp_path / f"run{index}", tmp_path / f"log{index}"
        process = zygote.start(to_dict(long), out, log, patch=patch)
        time.sleep(draw.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        code = zygote.wait(process)
        if number == signal.SIGKILL:
            assert code in (0, -signal.SIGKILL), log.read_text()
        else:
            assert code in (0, -number, 128 + number), log.read_text()
        left_running += code != 0
        process = zygote.start(to_dict(long), out, log, patch=patch)
        assert zygote.wait(process) == 0, log.read_text()
        assert_same_run(reference, out)
        names = sorted(path.name for path in (out / "checkpoint").iterdir())
        assert names == ["latest", "step-00000058", "step-00000060"]
    return left_running


def test_killed_at_random_moments(zygote, long, whole, tmp_path):
    interrupted_runs(zygote, long, whole, tmp_path, 3, signal.SIGKILL, seed=1)


@pytest.mark.slow
def test_killed_at_25_random_moments(zygote, long, whole, tmp_path):
    met = interrupted_runs(zygote, long, whole, tmp_path, 25, signal.SIGKILL, seed=2)
    assert met >= 15  # the others had ended


@pytest.mark.slow
def test_killed_while_checkpoints_are_written_in_the_background(zygote, long, whole, tmp_path):
    kill = signal.SIGKILL
    met = interrupted_runs(zygote, long, whole, tmp_path, 10, kill, seed=6, patch=IN_BACKGROUND)
    assert met >= 5


SLOW_READS = """
import os, time
from fsspec.implementations.local import LocalFileSystem
from bd3lm.data import remote_tokens

def slowly(self, path, start=None, end=None):
    time.sleep(0.001)
    with open(path, "rb") as file:
        file.seek(start or 0)
        return file.read(-1 if end is None else end - (start or 0))

LocalFileSystem.cat_file = slowly
remote_tokens.LEAST_SLOTS = 4
os.environ["XDG_CACHE_HOME"] = {cache!r}
"""


@pytest.mark.slow
def test_killed_while_rows_come_from_a_url(zygote, long, whole, tmp_path):
    """Ten kills of runs whose rows come slowly, through a cache of a part of the tokens."""
    data, cache = tmp_path / "data", str(tmp_path / "cache")
    shutil.copytree(long.data, data)
    for split in ("train", "valid"):
        cut_into_pieces(data / split, PIECE)
    assert (data / "train" / "tokens.bin").stat().st_size > 7 * PIECE
    remote = dataclasses.replace(long, data=f"file://{data}", cache_size=str(4 * PIECE))
    patch, kill = SLOW_READS.format(cache=cache), signal.SIGKILL
    met = interrupted_runs(zygote, remote, whole, tmp_path, 10, kill, seed=9, patch=patch)
    assert met >= 5
    assert not list((tmp_path / "cache" / "bd3lm" / "rows").iterdir())


SLOW_UPLOADS = """
import time
from fsspec.implementations.local import LocalFileSystem

def slowly(self, source, target, **options):
    with open(source, "rb") as file, open(target, "wb") as copy:
        while part := file.read(2048):
            copy.write(part)
            copy.flush()
            time.sleep(0.001)

LocalFileSystem.cp_file = slowly
"""


@pytest.mark.slow
def test_killed_while_a_copy_is_uploaded(zygote, long, whole, tmp_path):
    """After each of 10 kills the copy holds a whole checkpoint, which is all that is left."""
    reference, seconds = whole
    draw, found = random.Random(4), 0
    for index in range(10):
        out, log = tmp_path / "run", tmp_path / f"log{index}"
        copy = tmp_path / f"copy{index}"
        mirrored = to_dict(dataclasses.replace(long, mirror=f"file://{copy}"))
        process = zygote.start(mirrored, out, log, patch=SLOW_UPLOADS)
        time.sleep(draw.uniform(0.2, 1.5) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        assert zygote.wait(process) in (0, -signal.SIGKILL), log.read_text()
        if (copy / "checkpoint" / "latest").exists():
            meta = read_meta(find_checkpoint(copy))
            for name in meta.files.values:
                meta.verified(name)
            found += 0 < meta.step < 60
        shutil.rmtree(out)
        assert zygote.wait(zygote.start(mirrored, out, log)) == 0, log.read_text()
        assert_same_run(reference, out)
        shutil.rmtree(out)
        assert load_checkpoint(f"file://{copy}").step == 60
    assert found >= 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals_finish_the_step_and_save(zygote, long, whole, tmp_path, number):
    long = dataclasses.replace(long, steps=2000, checkpoint_every=2000)
    process = zygote.start(to_dict(long), tmp_path / "run", tmp_path / "log")
    file = tmp_path / "run" / "metrics.jsonl"
    while not file.exists():
        time.sleep(0.01)
    os.kill(process, number)
    assert zygote.wait(process) == 128 + number
    message = (tmp_path / "log").read_text()
    assert "the run is saved. Continue it with: bd3lm-train --out" in message
    last = read_metrics(file)[-1]["step"]
    assert find_checkpoint(tmp_path / "run").name == f"step-{last:08d}"


def test_a_signal_in_a_library_that_raises_an_error_of_its_own():
    """As FSDP's dispatch of operators does with any error."""

    def library():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except Exception as error:
            raise RuntimeError("no such operator") from error

    with pytest.raises(InterruptedRunError, match=r"^stopped$") as caught, immediate("stopped"):
        library()
    assert caught.value.exit_code == 128 + signal.SIGTERM


@pytest.mark.slow
def test_preempted_ten_times_and_always_resumed(zygote, long, whole, tmp_path):
    reference, seconds = whole
    draw, codes = random.Random(3), []
    for _ in range(10):
        process = zygote.start(to_dict(long), tmp_path / "run", tmp_path / "log")
        time.sleep(draw.uniform(0.2, 0.4) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        codes.append(zygote.wait(process))
    codes.append(zygote.wait(zygote.start(to_dict(long), tmp_path / "run", tmp_path / "log")))
    assert set(codes) <= {0, 128 + signal.SIGTERM}, (tmp_path / "log").read_text()
    assert codes[-1] == 0
    assert_same_run(reference, tmp_path / "run")


def test_two_trainers_of_one_run(zygote, long, whole, tmp_path):
    reference, _ = whole
    logs = [tmp_path / "log0", tmp_path / "log1"]
    processes = [zygote.start(to_dict(long), tmp_path / "run", log) for log in logs]
    codes = [zygote.wait(process) for process in processes]
    assert sorted(codes) == [0, 2]
    refused = logs[codes.index(2)].read_text()
    assert refused.startswith(f"error: {tmp_path / 'run'} already holds a run")
    assert refused.count("\n") == 1
    assert_same_run(reference, tmp_path / "run")


def runs_short_of_memory(zygote, small, tmp_path, megabytes):
    """Runs with so much address space beyond that of their imports; returns their exit codes.

    With each of them another allocation is the first that fails: of PyTorch, oneDNN, the
    interpreter, a thread's stack. The checkpoint saved then is whole. oneDNN follows a null pointer
    where its own memory for a product is refused (seen in PyTorch 2.15). Rust and
    glibc end the process, and say why, where not even a few bytes are left.
    """
    wide = dataclasses.replace(
        small,
        seq_len=128,
        batch_size=32,
        steps=4,
        checkpoint_every=1,
        model=dataclasses.replace(small.model, width=64, depth=2),
    )
    codes = []
    for index, size in enumerate(megabytes):
        out, log = tmp_path / f"run{index}", tmp_path / f"log{index}"
        codes.append(zygote.wait(zygote.start(to_dict(wide), out, log, memory=size << 20)))
        message = log.read_text()
        ends = (0, 2, -signal.SIGSEGV)
        if message.startswith(("memory allocation of", "cannot allocate memory for thread-local")):
            ends = (-signal.SIGABRT, 127)
        assert codes[-1] in ends, (size, message)
        if codes[-1] == 2:
            assert message.startswith("error: ")
            assert message.count("\n") == 1
            assert "memory" in message
        elif codes[-1] == -signal.SIGSEGV:
            inmost = message.split("Current thread")[1].splitlines()[1]
            assert "/bd3lm/model/" in inmost, message
        if (out / "checkpoint" / "latest").exists():
            load_checkpoint(out)
    return codes


def test_runs_short_of_memory(zygote, small, tmp_path):
    codes = runs_short_of_memory(zygote, small, tmp_path, (0, 20, 100))
    assert codes[0] == 2


@pytest.mark.slow
def test_runs_short_of_memory_at_40_places(zygote, small, tmp_path):
    sizes = [*range(0, 40, 2), *range(40, 240, 10)]
    codes = runs_short_of_memory(zygote, small, tmp_path, sizes)
    assert codes.count(2) > 25


def reads_beside_a_writer(tmp_path, reads):
    """Read again and again while another process saves; returns the results."""
    root = tmp_path / "run" / "checkpoint"
    root.mkdir(parents=True)
    save(root, 1)
    writer = os.fork()
    if writer == 0:
        with contextlib.suppress(BaseException):
            for step in range(2, 10**6):
                save(root, step)
        os._exit(1)
    steps = []
    try:
        while len(steps) < reads:
            steps.append(read_checkpoint(tmp_path / "run", saved))
        assert os.waitpid(writer, os.WNOHANG) == (0, 0)  # no save failed
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    return steps


def test_readers_beside_a_writer_meet_no_torn_checkpoint(tmp_path):
    steps = reads_beside_a_writer(tmp_path, 300)
    assert steps == sorted(steps)
    assert len(set(steps)) > 3


@pytest.mark.slow
def test_15000_reads_beside_a_writer(tmp_path):
    steps = reads_beside_a_writer(tmp_path, 15_000)
    assert steps == sorted(steps)
    assert len(set(steps)) > 100
