"""Saving on a disk that loses power at any moment, or refuses any operation."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bd3lm.checkpoint.native import read_meta, write_checkpoint
from bd3lm.checkpoint.steps import BEST, StepFolders, find_checkpoint
from bd3lm.config import preset
from bd3lm.errors import CheckpointError, DiskFullError, StorageError
from bd3lm.training.metrics import MetricsLog, read_metrics
from tests.reliability.disk import PowerCut, Refusal, install

TOKENIZER = SimpleNamespace(json="{}", vocab_size=4, bos_id=0, eos_id=1, mask_id=2)


def save(root: Path, step: int, keep: int = 1) -> None:
    """A checkpoint whose tensors hold its step."""
    folders = StepFolders(root, keep)
    tensors = {"x": torch.full((5,), float(step))}
    with folders.new(step) as folder:
        write_checkpoint(
            folder,
            preset("demo"),
            TOKENIZER,  # type: ignore[arg-type]
            step=step,
            averaged=tensors,
            training=tensors,
            state={},
        )


def saved(path: Path) -> int:
    """The step of a checkpoint, all of whose files are whole."""
    meta = read_meta(find_checkpoint(path))
    for name in ("model.safetensors", "training.safetensors"):
        (tensor,) = meta.tensors(name).load().values()
        assert tensor.tolist() == [meta.step] * 5
    file = meta.verified("tokenizer.json")
    try:
        assert file.read_text() == "{}"
    except FileNotFoundError as error:  # removed since it was verified
        raise CheckpointError(str(error)) from error
    return meta.step


def test_power_cut_at_any_moment_of_a_save_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    save(run / "checkpoint", 1)
    cuts = 0
    seen: list[tuple[int, int]] = []

    def cut() -> None:
        nonlocal cuts
        pair = []
        for names_kept in (False, True):
            image = tmp_path / "image"
            disk.image(image, names_kept=names_kept)
            pair.append(saved(image))
            shutil.rmtree(image)
        seen.append((pair[0], pair[1]))
        cuts += 1

    disk = PowerCut(run, cut)
    install(monkeypatch, disk.hook)
    for step in (2, 3):
        before = len(seen)
        save(run / "checkpoint", step)
        steps = {step for pair in seen[before:] for step in pair}
        assert steps == {step - 1, step}
        for pair in zip(*seen[before:], strict=True):
            assert list(pair) == sorted(pair)  # once new, never old again
        assert seen[-1] == (step, step)
    assert cuts >= 50, cuts
    assert not (run / "checkpoint" / "step-00000001").exists()


def test_power_cut_in_the_first_save_leaves_no_half_of_one(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    found: list[int | None] = []

    def cut() -> None:
        image = tmp_path / "image"
        disk.image(image, names_kept=True)
        folders = StepFolders(image / "checkpoint", 1)
        found.append(saved(image) if folders.latest() is not None else None)
        shutil.rmtree(image)

    disk = PowerCut(run, cut)
    install(monkeypatch, disk.hook)
    save(run / "checkpoint", 5)
    assert found[0] is None
    assert found[-1] == 5
    assert set(found) == {None, 5}


def test_a_save_without_syncs_would_be_noticed(tmp_path, monkeypatch):
    """The simulation itself: with `fsync` left out, the old checkpoint is lost."""
    run = tmp_path / "run"
    run.mkdir()
    save(run / "checkpoint", 1)
    disk = PowerCut(run, lambda: None)

    def lazy(name, function, *args, **options):
        return None if name == "fsync" else disk.hook(name, function, *args, **options)

    install(monkeypatch, lazy)
    save(run / "checkpoint", 2)
    disk.image(tmp_path / "image", names_kept=True)
    with pytest.raises(Exception, match=r"latest must hold the name|is missing|not valid JSON"):
        saved(tmp_path / "image")


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, DiskFullError), (errno.EIO, StorageError), (errno.EROFS, StorageError)],
)
def test_any_operation_may_fail(tmp_path, number, kind):
    root = tmp_path / "checkpoint"
    save(root, 1)
    with pytest.MonkeyPatch.context() as patch:
        count = Refusal(None, number)
        install(patch, count.hook)
        save(root, 2)
    assert count.operations > 25
    refused = 0
    for at in range(count.operations):
        step = 3 + at
        with pytest.MonkeyPatch.context() as patch:
            install(patch, Refusal(at, number).hook)
            try:
                save(root, step)
            except (DiskFullError, StorageError) as error:
                refused += 1
                assert type(error) is kind
                assert str(root) in str(error)
                assert "\n" not in str(error)
        assert saved(root) in (step - 1, step)
        if saved(root) != step:
            save(root, step)  # the space is back
    assert refused >= count.operations - 3  # removing an old folder may fail without a word
    save(root, 1000)  # and a later save removes it
    assert {path.name for path in root.iterdir()} == {"latest", "step-00001000"}


def test_the_best_stays_and_so_do_the_last(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
        if step == 2:
            StepFolders(tmp_path, 2).point(BEST, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "latest",
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]
    assert saved(tmp_path / "best") == 2
    assert saved(tmp_path) == 5


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        save(tmp_path / "checkpoint", 1)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


# --- the log ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [b'{"step": 3, "lo', b"\0" * 40, b"\xff\xfe\x80", b'{"loss": 1}\n', b"[" * 100_000, b"3\n"],
)
def test_damaged_ends_of_the_log_are_dropped(tmp_path, end):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 2.0})
    log.append({"step": 2, "loss": float("nan"), "clip": (0.5, float("inf"))})
    with log.file.open("ab") as file:
        file.write(end)
    log.rewind(2)
    lines = log.file.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None, "clip": [0.5, None]},
    ]
    log.append({"step": 3})
    assert [line["step"] for line in read_metrics(log.file)] == [1, 2, 3]
    log.rewind(1)
    assert [line["step"] for line in read_metrics(log.file)] == [1]


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})

    def nearly_full(name, function, *args):
        if name != "write":
            return function(*args)
        if len(args[1]) < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(args[0], args[1][:4])  # the rest of the disk

    install(monkeypatch, nearly_full)
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl: no space left on the device"):
        log.append({"step": 2, "loss": 1.0})
    assert log.file.read_text() == '{"step": 1}\n'
