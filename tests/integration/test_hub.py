"""Data sets by name: a local folder replaces the hub."""

import dataclasses
import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bd3lm.cli import evaluate
from bd3lm.data import Dataset, load_tokenizer
from bd3lm.data.hub import KNOWN, named, prepare_split
from bd3lm.data.resolve import open_data, open_splits
from bd3lm.errors import ConfigError, FormatError
from bd3lm.training import run_training
from tests.integration.conftest import Silent, story


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set with two splits."""
    root = tmp_path_factory.mktemp("hub") / "stories"
    root.mkdir()
    for split, seeds in (("train", range(40)), ("test", range(40, 45))):
        rows = (json.dumps({"text": story(seed, 60), "number": seed}) for seed in seeds)
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def documents(data):
    return [
        data.tokenizer.decode(data.document(i)[:-1].tolist()) for i in range(data.num_documents)
    ]


def test_splits_are_streamed_and_cut_as_they_are_named(folder, tmp_path):
    notes = []
    splits = open_splits(
        f"hub:{folder}@train[:-10]", f"hub:{folder}@train[-10:]", "default", tmp_path, notes.append
    )
    assert documents(splits.train) == [story(seed, 60) for seed in range(30)]
    assert documents(splits.valid) == [story(seed, 60) for seed in range(30, 40)]
    assert len(notes) == 2
    scored = open_data(f"hub:{folder}@test", "default", tmp_path / "test", notes.append)
    assert documents(scored) == [story(seed, 60) for seed in range(40, 45)]
    # A second time it is there.
    assert open_data(f"hub:{folder}@gone", "default", tmp_path / "test", print).num_documents == 5


def test_a_named_set_is_scored_with_and_without_eos(config, folder, tmp_path, capsys):
    run_training(dataclasses.replace(config, steps=1), tmp_path / "run", Silent())
    args = [str(tmp_path / "run" / "checkpoint"), "--data", f"hub:{folder}@test", "--json"]
    texts = [story(seed, 60) for seed in range(40, 45)]
    tokens = [len(load_tokenizer("default").encode(text)) for text in texts]
    for extra, eos in ([], 1), (["--no-eos"], 0):
        evaluate.main([*args, *extra])
        record = json.loads(capsys.readouterr().out)
        assert record["tokens"] == sum(tokens) + eos * len(texts)
        assert record["coverage"] == 1.0
        bits = record["nelbo"] * record["tokens"] / math.log(2)
        assert record["bpb"] == pytest.approx(bits / sum(map(len, texts)))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*args, "--lines"])
    assert stop.value.code == 2
    assert "lines = True: must be off for a data set of the hub" in capsys.readouterr().err


def test_the_papers_data_sets_have_their_splits_and_rules():
    assert named("openwebtext").train == "train[:-100000]"
    assert named("openwebtext").valid == "train[-100000:]"
    for name, source in KNOWN.items():
        assert source.train or source.valid
        assert named(name) is source
    other = named("some/one:config@validation")
    assert (other.path, other.config, other.train) == ("some/one", "config", "validation")


def test_what_cannot_be_loaded_says_so_and_leaves_nothing(folder, tmp_path):
    tokenizer = load_tokenizer("default")
    with pytest.raises(ConfigError, match="hub: and one of lm1b, openwebtext, wikitext2"):
        named("nothing")
    with pytest.raises(
        ConfigError, match=r"data = hub:lm1b@train: must be a data set that can be loaded"
    ):
        prepare_split(named("lm1b"), "train", tokenizer, tmp_path / "set")
    with pytest.raises(ConfigError, match=r"can be loaded here"):
        prepare_split(named(f"{folder}@moon"), "moon", tokenizer, tmp_path / "set")
    with pytest.raises(ConfigError, match=r"SPLIT or SPLIT\[FIRST:END\] after the @"):
        prepare_split(named(f"{folder}@train[a:b]"), "train[a:b]", tokenizer, tmp_path / "set")
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(FormatError, match="it has no field text, only body"):
        prepare_split(named(f"{other}@train"), "train", tokenizer, tmp_path / "set")
    with pytest.raises(ConfigError, match="a data set with a training split"):
        open_splits("hub:lambada", None, "default", tmp_path, print)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(Exception, match="already exists"):
        prepare_split(named(f"{folder}@test"), "test", tokenizer, taken)
    assert not (tmp_path / "set").exists()
    assert not list(tmp_path.glob(".*partial"))


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A hub that serves files of a folder: (branch, repository) to names."""
    from bd3lm import hub

    branches = {}

    def list_files(repo, *, kind="dataset", revision=None):
        if (repo, revision) not in branches:
            raise hub.HubError("404 Client Error: revision not found")
        return branches[repo, revision]

    def download(repo, filename, *, kind="model", revision=None):
        assert kind == "dataset"
        assert filename in branches[repo, revision]
        return tmp_path / "served" / filename.replace("/", "-")

    monkeypatch.setattr(hub, "list_files", list_files)
    monkeypatch.setattr(hub, "download", download)
    (tmp_path / "served").mkdir()
    return branches


def put(path, texts, **options):
    pq.write_table(pa.table({"text": texts}), path, **options)


def test_the_parquet_branch_of_the_hub(served, tmp_path):
    names = ["en/train/0000.parquet", "en/train/0001.parquet", "en/test/0000.parquet"]
    served["some/set", "refs/convert/parquet"] = [
        *names[::-1],
        "de/train/0000.parquet",
        "README.md",
    ]
    for i, name in enumerate(names):
        texts = [f"text {i} {j}" for j in range(10)]
        put(tmp_path / "served" / name.replace("/", "-"), texts, row_group_size=3)
    tokenizer = load_tokenizer("default")

    def read(name):
        source = named(name)
        prepare_split(source, source.train, tokenizer, tmp_path / "set")
        found = documents(Dataset(tmp_path / "set"))
        shutil.rmtree(tmp_path / "set")
        return found

    both = [f"text {i} {j}" for i in (0, 1) for j in range(10)]
    assert read("some/set:en@train") == both
    for part, expected in {
        "[:-4]": both[:-4],
        "[-4:]": both[-4:],
        "[7:12]": both[7:12],
        "[:10%]": both[:2],
        "[50%:]": both[10:],
    }.items():
        assert read(f"some/set:en@train{part}") == expected
    assert read("some/set:en@test") == [f"text 2 {j}" for j in range(10)]
    for name, reason in {
        "some/set@train": "one of its configurations must be named: de, en",
        "some/set:en@moon": "it has no en@moon, only en@test, en@train",
        "other/set@train": "404",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            read(name)


def test_the_files_of_a_repository_without_that_branch(served, tmp_path):
    served["a/b", None] = ["data/train-00000-of-00001.parquet", "data/test.txt", "README.md"]
    put(tmp_path / "served" / "data-train-00000-of-00001.parquet", ["one", "two"])
    prepare_split(named("a/b@train"), "train", load_tokenizer("default"), tmp_path / "set")
    assert documents(Dataset(tmp_path / "set")) == ["one", "two"]


def test_a_folder_of_a_repository_that_the_branch_does_not_have(served, tmp_path):
    """As FineWeb's: ``sample/10BT``, while the branch holds configurations converted in part."""
    served["a/b", "refs/convert/parquet"] = ["c/partial-train/0.parquet", "d/train/0.parquet"]
    served["a/b", None] = ["data/c/0.parquet", "sample/10BT/000.parquet", "sample/100BT/0.parquet"]
    put(tmp_path / "served" / "sample-10BT-000.parquet", ["one", "two", "three"])
    prepare_split(named("a/b@10BT"), "10BT[1:]", load_tokenizer("default"), tmp_path / "set")
    assert documents(Dataset(tmp_path / "set")) == ["two", "three"]
    for name, reason in {"a/b@train": "must be named: c, d", "a/b:c@10BT": "has no c@10BT"}.items():
        with pytest.raises(ConfigError, match=reason):
            prepare_split(named(name), named(name).train, load_tokenizer("default"), tmp_path / "x")
