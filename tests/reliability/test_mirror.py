"""A run and its copy at a URL: read from there, uploaded at any moment, resumed from it alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import fsspec
import pytest

from bd3lm import storage
from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.native import read_meta
from bd3lm.checkpoint.steps import StepFolders, find_checkpoint
from bd3lm.cli.train import train
from bd3lm.errors import CheckpointError, ConfigError, ExistsError, MissingFileError, StorageError
from bd3lm.storage import Remote
from bd3lm.training import run_training
from bd3lm.training.mirror import Mirror
from bd3lm.training.trainer import Trainer
from tests.integration.conftest import Silent
from tests.reliability.test_disk import save, saved
from tests.reliability.test_kills import assert_same_run


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No waits between attempts, and a cache of the test's own."""
    monkeypatch.setattr(storage, "WAITS", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def run(tmp_path):
    """A directory with settings, a log and one checkpoint."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    save(out / "checkpoint", 1)
    return out


def mirror(url: str, out: Path, keep: int = 1) -> Mirror:
    return Mirror(url, out, StepFolders(out / "checkpoint", keep))


# --- reading ------------------------------------------------------------------------------------


PLACES = ["", "checkpoint", "checkpoint/latest", "checkpoint/step-00000012"]


@pytest.mark.parametrize("where", PLACES)
def test_a_checkpoint_is_read_from_a_url(trained, where):
    fsspec.filesystem("memory").put(str(trained), "/bucket/run", recursive=True)
    loaded = load_checkpoint(f"memory://bucket/run/{where}")
    local = load_checkpoint(trained)
    assert loaded.step == local.step
    for name, tensor in local.model.state_dict().items():
        assert tensor.equal(loaded.model.state_dict()[name])
    assert not (loaded.path / "training.safetensors").exists()  # only a run needs it


def test_reading_again_downloads_nothing(trained, monkeypatch):
    fsspec.filesystem("memory").put(str(trained), "/bucket/run", recursive=True)
    load_checkpoint("memory://bucket/run")
    monkeypatch.setattr(Remote, "download", lambda *_: pytest.fail("downloaded again"))
    load_checkpoint("memory://bucket/run")


def test_a_damaged_copy_is_named_and_not_kept(trained):
    memory = fsspec.filesystem("memory")
    memory.put(str(trained), "/bucket/run", recursive=True)
    file = f"/bucket/run/checkpoint/{find_checkpoint(trained).name}/model.safetensors"
    whole = memory.cat_file(file)
    memory.pipe_file(file, whole[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"memory://.*model\.safetensors is damaged"):
        load_checkpoint("memory://bucket/run")
    memory.pipe_file(file, whole)
    load_checkpoint("memory://bucket/run")


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("memory://nowhere/run", MissingFileError, "no such checkpoint"),
        ("nosuch://bucket/run", ConfigError, "whose protocol fsspec knows"),
    ],
)
def test_nothing_at_a_url_is_one_sentence(url, kind, message):
    with pytest.raises(kind, match=message):
        load_checkpoint(url)


# --- uploading ----------------------------------------------------------------------------------


def refusing(monkeypatch, at: int) -> list[str]:
    """Let the n-th request that changes the storage, and all later ones, fail."""
    seen: list[str] = []

    def counted(name, call):
        def wrapped(self, *args, **options):
            seen.append(name)
            if len(seen) > at:
                raise ConnectionError("the network is gone")
            return call(self, *args, **options)

        return wrapped

    kind = type(fsspec.filesystem("memory"))
    for name in ("put_file", "pipe_file", "mv", "rm"):
        monkeypatch.setattr(kind, name, counted(name, getattr(kind, name)))
    return seen


def copied(tmp_path: Path) -> int:
    """The step of the copy, all of whose files are whole."""
    image = tmp_path / "image"
    shutil.rmtree(image, ignore_errors=True)
    fsspec.filesystem("memory").get("/bucket/run", str(image), recursive=True)
    return saved(image)


def test_an_upload_that_ends_anywhere_leaves_a_whole_checkpoint(run, tmp_path):
    mirror("memory://bucket/run", run).upload()
    assert copied(tmp_path) == 1
    cuts, step = 0, 1
    while True:
        step += 1
        save(run / "checkpoint", step)
        (run / "summary.json").write_text(str(step))  # a run that has ended
        with pytest.MonkeyPatch.context() as patch:
            seen = refusing(patch, cuts)
            try:
                mirror("memory://bucket/run", run).upload()
            except StorageError as error:
                assert "the network is gone" in str(error)
            else:
                break
        found = copied(tmp_path)
        assert found in (step - 1, step), seen
        file = tmp_path / "image" / "summary.json"
        if file.exists() and file.read_text() == str(step):
            assert found == step
        mirror("memory://bucket/run", run).upload()
        assert copied(tmp_path) == step
        cuts += 1
    assert cuts > 8
    folders = Remote("memory://bucket/run/checkpoint").folders()
    assert folders == [f"step-{step:08d}"]


def test_the_last_ones_and_the_best_stay(run):
    folders = StepFolders(run / "checkpoint", 2)
    for step in range(2, 7):
        save(run / "checkpoint", step, keep=2)
        if step == 3:
            folders.point("best", step)
        mirror("memory://bucket/run", run, keep=2).upload()
    remote = Remote("memory://bucket/run/checkpoint")
    assert remote.folders() == ["step-00000003", "step-00000005", "step-00000006"]
    assert sorted(remote.sizes()) == ["best", "latest"]


def test_a_folder_stays_while_it_is_uploaded(run):
    folders = StepFolders(run / "checkpoint", 1)
    with folders.held("latest") as first:
        save_with(folders, 2)
        save_with(folders, 3)
        assert first.is_dir()
        assert not (run / "checkpoint" / "step-00000002").exists()
    save_with(folders, 4)
    assert not first.exists()


def save_with(folders: StepFolders, step: int) -> None:
    with folders.new(step):
        pass


def test_failures_are_named_and_the_end_waits(run, monkeypatch):
    notes: list[str] = []
    copy = mirror("memory://bucket/run", run)
    with pytest.MonkeyPatch.context() as patch:
        refusing(patch, 3)
        copy.update()
        with pytest.raises(StorageError, match=r"memory://.* lacks the end of this run, which is"):
            copy.finish()
        copy.warn(notes.append)
        copy.warn(notes.append)
    (note,) = notes
    assert "the network is gone; the next checkpoint is uploaded again" in note
    copy.update()
    copy.finish()
    assert Remote("memory://bucket/run/checkpoint").read("latest") == b"step-00000001\n"


def test_a_request_is_repeated(monkeypatch):
    monkeypatch.setattr(storage, "WAITS", (0, 0))
    kind, failures = type(fsspec.filesystem("memory")), [1, 2]
    call = kind.pipe_file

    def sometimes(self, *args, **options):
        if failures:
            raise TimeoutError(failures.pop())
        return call(self, *args, **options)

    monkeypatch.setattr(kind, "pipe_file", sometimes)
    remote = Remote("memory://bucket/run")
    remote.replace("latest", b"step")
    assert remote.read("latest") == b"step"
    assert not failures


def test_a_disk_has_folders(tmp_path):
    remote = Remote(f"file://{tmp_path}/a/b")
    remote.replace("c/latest", b"old")
    remote.replace("c/latest", b"new")
    assert (tmp_path / "a" / "b" / "c" / "latest").read_bytes() == b"new"
    assert remote.folders() == ["c"]
    remote.remove("c")
    assert remote.folders() == []


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_continues_where_only_its_copy_is_left(small, trained, tmp_path, capsys):
    """Its machine is gone in step 6; the copy has everything of step 4."""
    url, out = "memory://bucket/run", tmp_path / "run"
    mirrored = dataclasses.replace(small, mirror=url, keep=1)
    after = Trainer._after_step

    def gone(self, window):
        after(self, window)
        if self.steps_done == 6:
            raise ArithmeticError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_after_step", gone)
        with pytest.raises(ArithmeticError):
            run_training(mirrored, out, Silent())
    shutil.rmtree(out)
    with pytest.raises(ExistsError, match=r"already holds a run; choose another --mirror"):
        run_training(mirrored, out, Silent())
    other = dataclasses.replace(mirrored, seed=9)
    with pytest.raises(ConfigError, match="seed"):
        run_training(other, out, Silent(), resume=True)
    run_training(mirrored, out, Silent(), resume=True)
    assert_same_run(trained, out)
    assert load_checkpoint(url).step == small.steps
    names = Remote(url).sizes()
    assert {"config.json", "metrics.jsonl", "summary.json", "samples.txt"} <= names.keys()
    shutil.rmtree(out)
    train(["--out", str(out), "--mirror", url, "--resume"], "bd3lm-train")  # settings of the copy
    assert "has ended already, after step 12" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["seq_len"] == small.seq_len
    assert read_meta(find_checkpoint(out)).step == small.steps
