"""Runs and checkpoints in S3, as a local server of moto speaks it, through s3fs."""

import dataclasses
import shutil

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

import fsspec
import s3fs
from moto.server import ThreadedMotoServer

from bd3lm import storage
from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.steps import StepFolders
from bd3lm.cli.evaluate import main as evaluate
from bd3lm.errors import MissingFileError, StorageError
from bd3lm.storage import Remote
from bd3lm.training import run_training
from bd3lm.training.mirror import Mirror
from tests.integration.conftest import Silent, config, corpus  # noqa: F401 (fixtures)
from tests.reliability.test_disk import save, saved

URL = "s3://bucket/runs/book"


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    """An empty bucket."""
    options = {"endpoint_url": server, "key": "test", "secret": "test"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "WAITS", ())
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield files
    files.invalidate_cache()
    files.rm("bucket", recursive=True)


def test_a_run_continues_on_another_machine(s3, config, corpus, tmp_path, capsys):  # noqa: F811
    mirrored = dataclasses.replace(config, mirror=URL, checkpoint_every=2)
    half = dataclasses.replace(mirrored, steps=4)
    run_training(half, tmp_path / "first", Silent())
    shutil.rmtree(tmp_path / "first")
    run_training(mirrored, tmp_path / "second", Silent(), resume=True)
    assert load_checkpoint(URL).step == 6
    evaluate([URL, "--data", str(corpus / "valid"), "--json", "--device", "cpu"])
    assert f'"checkpoint": "{URL}"' in capsys.readouterr().out
    again = dataclasses.replace(config, init_from=f"{URL}/checkpoint", init_optimizer=True)
    run_training(again, tmp_path / "again", Silent())


def test_large_files_go_up_in_parts_and_come_back(s3, tmp_path):
    content = bytes(range(256)) * (60 << 12)  # 60 MiB; s3fs cuts at 50
    (tmp_path / "large").write_bytes(content)
    remote = Remote(URL)
    remote.upload(tmp_path / "large", "model.safetensors")
    remote.download("model.safetensors", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_an_upload_that_ends_at_any_request_leaves_a_whole_checkpoint(s3, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    cuts, step = 0, 1
    save(run / "checkpoint", step)
    copy(run).upload()
    call = s3fs.S3FileSystem._call_s3
    changes = ("put_object", "copy_object", "delete_object", "delete_objects")
    while True:
        step += 1
        save(run / "checkpoint", step)
        seen = []

        async def cut(self, method, *args, seen=seen, cuts=cuts, **options):
            seen += [method] if method in changes else []
            if len(seen) > cuts:
                raise ConnectionError("the network is gone")
            return await call(self, method, *args, **options)

        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", cut)
        try:
            copy(run).upload()
            ended = True
        except StorageError:
            ended = False
        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
        assert copied(s3, tmp_path) in ((step,) if ended else (step - 1, step)), seen
        if ended:
            break
        copy(run).upload()
        assert copied(s3, tmp_path) == step
        cuts += 1
    assert cuts > 8


def copy(run):
    return Mirror(URL, run, StepFolders(run / "checkpoint", 1))


def copied(s3, tmp_path):
    """The step of the copy, all of whose files are whole."""
    shutil.rmtree(tmp_path / "image", ignore_errors=True)
    s3.invalidate_cache()
    s3.get("bucket/runs/book", str(tmp_path / "image"), recursive=True)
    return saved(tmp_path / "image")


def test_a_bucket_is_not_made(s3, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises((MissingFileError, StorageError)):
        Remote("s3://other/run").upload(tmp_path / "file", "checkpoint/latest")
    assert [entry.rstrip("/") for entry in s3.ls("")] == ["bucket"]
