"""Data sets of several shards: joined, completed after a kill, written from texts in memory."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bd3lm.data import (
    Dataset,
    Loader,
    NoiseSpec,
    Rows,
    Schedule,
    join,
    load_tokenizer,
    prepare,
    prepare_shards,
    prepare_texts,
)
from bd3lm.data.shards import PLAN
from bd3lm.errors import ConfigError, EmptyCorpusError, ExistsError, NotADatasetError

TOKENIZER = load_tokenizer("default")


def write_files(folder, count, documents=20, words=30):
    draw = random.Random(3)
    choice = "the old house stood by the river and no one knew who had built it".split()
    for index in range(count):
        lines = (" ".join(draw.choices(choice, k=words)) for _ in range(documents))
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{index}.jsonl").write_text(text)
    return [folder / f"{index}.jsonl" for index in range(count)]


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_rows_and_noise_are_those_of_one_data_set(tmp_path):
    files = write_files(tmp_path, 3)
    prepare(files, TOKENIZER, tmp_path / "whole")
    made = prepare_shards(files, TOKENIZER, tmp_path / "joined")
    whole, joined = Dataset(tmp_path / "whole"), Dataset(tmp_path / "joined")
    assert (made.num_documents, made.num_tokens) == (whole.num_documents, whole.num_tokens)
    assert made.num_bytes == whole.manifest.num_bytes
    assert made.records is not None
    assert made.records.read == 60
    assert joined.tokenizer.sha256 == whole.tokenizer.sha256
    assert np.array_equal(joined.token_counts(), whole.token_counts())
    for packing in ("wrap", "aligned", "best_fit"):
        batches = [
            Loader(Rows(data, seq_len=32, block_size=4, packing=packing), 8, seed=1).batch(
                5, NoiseSpec(Schedule("loglinear"))
            )
            for data in (whole, joined)
        ]
        assert np.array_equal(*(batch.x0.numpy() for batch in batches))
        assert np.array_equal(*(batch.xt.numpy() for batch in batches))


def test_an_interrupted_call_is_completed(tmp_path):
    files = write_files(tmp_path, 4)
    prepare_shards(files, TOKENIZER, tmp_path / "once")

    def stop(read, total, tokens):
        if (tmp_path / "again" / "shard-00001").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_shards(files, TOKENIZER, tmp_path / "again", progress=stop)
    with pytest.raises(NotADatasetError):
        Dataset(tmp_path / "again")
    finished = (tmp_path / "again" / "shard-00000" / "manifest.json").stat().st_mtime_ns
    prepare_shards(files, TOKENIZER, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    after = (tmp_path / "again" / "shard-00000" / "manifest.json").stat().st_mtime_ns
    assert after == finished
    with pytest.raises(ExistsError, match="already exists"):
        prepare_shards(files, TOKENIZER, tmp_path / "again")


def test_the_first_and_the_last_moment_of_a_call(tmp_path):
    files = write_files(tmp_path, 2)
    out = tmp_path / "out"
    out.mkdir()
    (out / f".{PLAN}.partial").write_text("{")  # killed while the plan was written
    prepare_shards(files, TOKENIZER, out)
    whole = contents(out)
    plan = {"inputs": [str(file) for file in files], "tokenizer": TOKENIZER.sha256}
    (out / PLAN).write_text(json.dumps(plan))  # killed before the plan was removed
    prepare_shards(files, TOKENIZER, out)
    assert contents(out) == whole


def test_another_call_does_not_complete_it(tmp_path):
    files = write_files(tmp_path, 2)

    def stop(read, total, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_shards(files, TOKENIZER, tmp_path / "out", progress=stop)
    with pytest.raises(ExistsError, match="was begun with inputs"):
        prepare_shards(files[:1], TOKENIZER, tmp_path / "out")
    with pytest.raises(ExistsError, match="was begun with eos = None, not False"):
        prepare_shards(files, TOKENIZER, tmp_path / "out", eos=False)
    with pytest.raises(ExistsError, match="already exists"):
        prepare_shards(files, TOKENIZER, tmp_path)


@pytest.mark.parametrize(
    ("inputs", "settings", "sentence"),
    [
        ([], {}, "inputs = .*at least one file"),
        (["."], {}, "inputs = .*a shard is one file"),
        (["a.txt"], {"valid_fraction": 0.1}, "valid-fraction = 0.1: must be None"),
    ],
)
def test_what_shards_cannot_be_made_of_is_refused(tmp_path, inputs, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        prepare_shards(inputs, TOKENIZER, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


PREPARE = """
import sys
from bd3lm.data import load_tokenizer, prepare_shards
print("begun", flush=True)
prepare_shards(sys.argv[2:], load_tokenizer("default"), sys.argv[1])
"""


@pytest.mark.parametrize("moments", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_killed_process_is_completed_bit_for_bit(tmp_path, moments):
    files = write_files(tmp_path, 6, documents=2000)
    begun = time.perf_counter()
    prepare_shards(files, TOKENIZER, tmp_path / "once")
    whole = time.perf_counter() - begun
    draw, killed = random.Random(moments), 0
    for moment in range(moments):
        out = tmp_path / f"killed-{moment}"
        command = [sys.executable, "-c", PREPARE, str(out), *map(str, files)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            if moment > 0:  # the first is killed at once, however fast the machine
                time.sleep(draw.uniform(0, 0.7) * whole)
            process.send_signal(signal.SIGKILL)
        if not (out / "manifest.json").exists() or (out / PLAN).exists():
            killed += 1
            subprocess.run(command, check=True, capture_output=True)
        assert contents(out) == contents(tmp_path / "once")
    assert killed > 0


def test_texts_in_memory_are_prepared(tmp_path):
    texts = [f"the old house {i}\n\u2028 stood" for i in range(3000)]
    made = prepare_texts(iter(texts), TOKENIZER, tmp_path / "out")
    assert made.num_documents == 3000
    data = Dataset(tmp_path / "out")
    assert TOKENIZER.decode(data.document(7).tolist()[:-1]) == texts[7]


def test_nothing_is_left_of_texts_that_fail(tmp_path):
    def texts():
        yield from ["a text"] * 5000
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        prepare_texts(texts(), TOKENIZER, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EmptyCorpusError):
        prepare_texts([], TOKENIZER, tmp_path / "out")
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExistsError):
        prepare_texts(["a"] * 100_000, TOKENIZER, tmp_path / "taken")


def test_join_finds_shards_by_number(tmp_path):
    for index, file in enumerate(write_files(tmp_path, 3)):
        prepare([file], TOKENIZER, tmp_path / "set" / f"shard-{index:05}")
    assert join(tmp_path / "set").num_documents == 60
