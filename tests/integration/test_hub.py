"""Data sets by name: a local folder stands for the hub."""

import dataclasses
import json
import math

import pytest

from bd3lm.cli import evaluate
from bd3lm.data import load_tokenizer
from bd3lm.data.hub import KNOWN, named, prepare_split
from bd3lm.data.resolve import open_data, open_splits
from bd3lm.errors import ConfigError
from bd3lm.training import run_training
from tests.integration.conftest import Silent, story


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `datasets` reads as a data set with two splits."""
    root = tmp_path_factory.mktemp("hub") / "stories"
    root.mkdir()
    for split, seeds in (("train", range(40)), ("test", range(40, 45))):
        rows = (json.dumps({"text": story(seed, 60), "number": seed}) for seed in seeds)
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


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
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ConfigError, match=r"with a field text; it has \['body'\]"):
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


def test_a_stream_that_breaks_off_leaves_no_half_set(monkeypatch, tmp_path):
    from bd3lm.data import hub

    def broken(source, split):
        yield {"text": "one document"}
        raise RuntimeError("the connection is gone")

    monkeypatch.setattr(hub, "_load", broken)
    with pytest.raises(ConfigError, match=r"reads to its end .the connection is gone."):
        prepare_split(named("lm1b"), "train", load_tokenizer("default"), tmp_path / "set")
    assert not (tmp_path / "set").exists()
