"""Runs and checkpoints in S3, as a local server of moto speaks it, through s3fs."""

import dataclasses
import json
import shutil

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

import fsspec
import s3fs
import torch
from moto.server import ThreadedMotoServer

from bd3lm import storage
from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.steps import StepFolders
from bd3lm.cli.evaluate import main as evaluate
from bd3lm.config import to_dict
from bd3lm.data import load_tokenizer
from bd3lm.errors import CorruptError, MissingFileError, StorageError
from bd3lm.storage import Remote
from bd3lm.training import read_metrics, run_training
from bd3lm.training.mirror import Mirror
from tests.integration.conftest import Silent, config, corpus, write_splits  # noqa: F401
from tests.reliability.test_disk import save, saved
from tests.reliability.test_kills import assert_same_run, state_of
from tests.reliability.zygote import Zygote
from tests.unit.test_remote_data import CACHE, PIECE, cut_into_pieces

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


@pytest.fixture
def streamed(s3, config, tmp_path):  # noqa: F811
    """A run on a directory, and the same on a bucket with a cache of a quarter of its tokens."""
    data = write_splits(tmp_path, load_tokenizer("default"), rows=(60, 6), words=400)
    for split in ("train", "valid"):
        cut_into_pieces(data / split, PIECE)
    s3.put(str(data), "bucket/data", recursive=True)
    local = dataclasses.replace(config, data=str(data))
    return local, dataclasses.replace(config, data="s3://bucket/data", cache_size=str(CACHE))


def test_a_run_reads_a_bucket_through_a_cache_that_is_too_small(s3, streamed, tmp_path, capsys):
    local, remote = streamed
    size = s3.info("bucket/data/train/tokens.bin")["size"]
    assert size > 4 * CACHE
    run_training(local, tmp_path / "local", Silent())
    run_training(remote, tmp_path / "remote", Silent())
    assert_same_run(tmp_path / "local", tmp_path / "remote")
    lines = read_metrics(tmp_path / "remote" / "metrics.jsonl")
    assert max(line.get("data_seconds", 0.0) for line in lines) > 0
    scored = []
    for data in (f"{local.data}/valid", "s3://bucket/data/valid", "s3://bucket/data"):
        run = str(tmp_path / "remote")
        evaluate([run, "--data", data, "--json", "--device", "cpu", "--cache-size", str(CACHE)])
        scored.append(json.loads(capsys.readouterr().out)["nelbo"])
    evaluate([str(tmp_path / "remote"), "--json", "--device", "cpu"])
    scored.append(json.loads(capsys.readouterr().out)["nelbo"])
    assert len(set(scored)) == 1


S3_OF_A_RANK = """
import fsspec
from bd3lm.data.piece_cache import PieceCache

fsspec.config.conf["s3"] = {options!r}
os.environ["XDG_CACHE_HOME"] = {cache!r}
write = PieceCache._write
def measured(self, slot, content):
    write(self, slot, content)
    with open(order["out"] + "/cache-" + os.environ["RANK"], "a") as sizes:
        print(os.fstat(self._file.fileno()).st_size, file=sizes)
PieceCache._write = measured
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_that_each_read_a_bucket(server, streamed, tmp_path, strategy):
    """Two ranks, each with a cache of its own: the run of two ranks on a directory."""
    parallel = dataclasses.replace(streamed[0].parallel, strategy=strategy)
    exact = {"precision": "fp32", "parallel": parallel, "batch_size": 7}
    local, remote = (dataclasses.replace(cfg, **exact) for cfg in streamed)
    options = {"endpoint_url": server, "key": "test", "secret": "test"}
    patch = S3_OF_A_RANK.format(options=options, cache=str(tmp_path / "cache"))
    zygote = Zygote()
    try:
        for name, ranks, cfg in (("one", 1, local), ("local", 2, local), ("remote", 2, remote)):
            log = tmp_path / f"{name}.log"
            job = zygote.job(ranks, to_dict(cfg), tmp_path / name, log, patch=patch)
            codes = [zygote.wait(process) for process in job]
            assert codes == [0] * ranks, log.read_text()
    finally:
        zygote.close()
    assert_same_run(tmp_path / "local", tmp_path / "remote")
    one, two = ([loss for _, loss in losses(tmp_path / name)] for name in ("one", "remote"))
    assert two == pytest.approx(one, rel=0, abs=1e-5)
    for rank in range(2):
        sizes = [int(n) for n in (tmp_path / "remote" / f"cache-{rank}").read_text().split()]
        assert max(sizes) <= CACHE
        assert len(sizes) > CACHE // PIECE  # pieces took the places of others
    assert not list((tmp_path / "cache" / "bd3lm" / "rows").iterdir())


def test_a_run_stops_at_a_damaged_piece_and_continues_when_it_is_mended(s3, streamed, tmp_path):
    local, remote = (dataclasses.replace(cfg, checkpoint_every=1) for cfg in streamed)
    run_training(local, tmp_path / "local", Silent())
    name, content = "bucket/data/train/tokens.bin", None
    out = tmp_path / "remote"
    half = dataclasses.replace(remote, steps=3)
    run_training(half, out, Silent())
    content = s3.cat_file(name)
    s3.pipe_file(name, bytes(len(content)))
    with pytest.raises(CorruptError, match=r"^s3://bucket/data/train/tokens.bin: piece \d+ "):
        run_training(remote, out, Silent(), resume=True)
    s3.pipe_file(name, content[: len(content) // 2])
    with pytest.raises((CorruptError, StorageError), match=r"^s3://bucket/data/train/tokens.bin"):
        run_training(remote, out, Silent(), resume=True)
    s3.rm(name)
    with pytest.raises(MissingFileError, match=r"^s3://bucket/data/train/tokens.bin"):
        run_training(remote, out, Silent(), resume=True)
    assert load_checkpoint(out).step == 3
    s3.pipe_file(name, content)
    run_training(remote, out, Silent(), resume=True)
    assert losses(tmp_path / "local") == losses(out)
    ours, theirs = state_of(out), state_of(tmp_path / "local")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def losses(run):
    return [(m["step"], m["loss"]) for m in read_metrics(run / "metrics.jsonl") if "loss" in m]


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
