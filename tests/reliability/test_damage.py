"""Damaged, swapped and hostile checkpoints: each is named in one sentence, or is the same."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.native import read_meta
from bd3lm.checkpoint.steps import find_checkpoint
from bd3lm.data import Dataset
from bd3lm.errors import Bd3lmError, CheckpointError, ConfigError
from bd3lm.training import Trainer
from tests.integration.conftest import Silent
from tests.reliability.conftest import edit

FILES = ["config.json", "model.safetensors", "training.safetensors", "tokenizer.json"]


def verify(folder):
    """Read everything that resuming reads."""
    meta = read_meta(folder)
    for name in ("model.safetensors", "training.safetensors"):
        meta.tensors(name).load()
    meta.verified("tokenizer.json")


def resume(small, folder, run):
    """Resume the run whose only checkpoint is `folder`."""
    shutil.copytree(folder, run / "checkpoint")
    data = Path(small.data)
    trainer = Trainer(small, Dataset(data / "train"), Dataset(data / "valid"), run, Silent())
    try:
        trainer.resume()
    finally:
        trainer.batches.close()
    return trainer


def flips(folder, count, seed):
    """Flip random bits, one at a time, spread over the files."""
    draw = random.Random(seed)
    for number in range(count):
        file = folder / FILES[number % len(FILES)]
        whole = file.read_bytes()
        at = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        yield file, at
        file.write_bytes(whole)


def test_600_flipped_bits_are_all_named(copy):
    named = 0
    for file, at in flips(copy, 600, seed=1):
        with pytest.raises(CheckpointError) as caught:
            verify(copy)
        assert str(copy) in str(caught.value), (file, at)
        assert "\n" not in str(caught.value)
        named += 1
    assert named == 600
    verify(copy)


def test_flipped_bits_of_the_pointer_are_named(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    pointer = run / "checkpoint" / "latest"
    whole = pointer.read_bytes()
    for at in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        pointer.write_bytes(damaged)
        try:
            found = find_checkpoint(run)
        except CheckpointError as error:
            assert str(pointer) in str(error)
        else:  # another folder that is there: it is whole too
            assert found.name != whole.decode().strip()
            verify(found)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "half", "longer", "folder", "pipe", "swapped"])
def test_files_that_are_not_what_was_written(copy, trained, name, how):
    file = copy / name
    whole = file.read_bytes()
    file.unlink()
    if how == "empty":
        file.write_bytes(b"")
    elif how == "half":
        file.write_bytes(whole[: len(whole) // 2])
    elif how == "longer":
        file.write_bytes(whole + b" ")
    elif how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "swapped":  # another step's: of the same length, and whole
        other = trained / "checkpoint" / "step-00000008" / name
        if other.read_bytes() == whole:
            return
        file.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=str(copy)):
        verify(copy)


# --- behind the digests: a checkpoint of version 1, which has none -----------------------------

WRONG = [None, "x", "", -1, 0, 2**70, 1.5, -1e300, 1e39, [], {}, [1], True, float("nan"), "9" * 99]


def paths(value, prefix=()):
    """Every place in a JSON value."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield (*prefix, name)
            yield from paths(part, (*prefix, name))


def put(meta, path, value):
    """Replace one place, or remove it."""
    for name in path[:-1]:
        meta = meta[name]
    if value is KeyError:
        del meta[path[-1]]
    else:
        meta[path[-1]] = value


def json_faults(meta):
    """Each place with each wrong value."""
    return [(path, value) for path in paths(meta) for value in [KeyError, *WRONG]]


def attack_json(small, old, tmp_path, faults):
    """Load and resume with each fault; returns how many were refused."""
    text = (old / "config.json").read_text()
    refused = 0
    for path, value in faults:
        meta = json.loads(text)
        put(meta, path, value)
        (old / "config.json").write_text(json.dumps(meta))
        for attempt in (load_checkpoint, lambda folder: resume(small, folder, tmp_path / "run")):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            (tmp_path / "run").mkdir()
            try:
                attempt(old)
            except (CheckpointError, ConfigError) as error:
                refused += 1
                assert "\n" not in str(error), (path, value)
                assert len(str(error)) < 500, (path, value)
    (old / "config.json").write_text(text)
    return refused


def test_wrong_values_in_the_json_are_named(small, old, tmp_path):
    meta = json.loads((old / "config.json").read_text())
    faults = random.Random(2).sample(json_faults(meta), 60)
    faults += [((name,), value) for name in meta for value in (KeyError, None, [], "x")]
    faults += [(("state", name), value) for name in meta["state"] for value in (KeyError, "x")]
    assert attack_json(small, old, tmp_path, faults) > len(faults)


@pytest.mark.slow
def test_every_wrong_value_in_the_json_is_named(small, old, tmp_path):
    faults = json_faults(json.loads((old / "config.json").read_text()))
    assert attack_json(small, old, tmp_path, faults) > len(faults)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{", '{"format": NaN}', "[" * 100_000, '{"a": ' * 100_000, "\0\0\0"],
)
def test_files_that_are_no_json_object(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("depth", 2**40), ("width", 2**40), ("mlp_width", 2**50), ("cond_width", 2**50)],
)
def test_numbers_that_no_machine_could_allocate(old, setting, value):
    edit(old, lambda meta: meta["config"]["model"].__setitem__(setting, value))
    with pytest.raises(CheckpointError):
        load_checkpoint(old)


def change_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)


WEIGHT = "blocks.0.qkv.weight"
TENSOR_FAULTS = {
    "half precision": (lambda t: t.update({WEIGHT: t[WEIGHT].half()}), "as float16"),
    "whole numbers": (lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)}), "as int8"),
    "NaN": (lambda t: t[WEIGHT].fill_(torch.nan), "NaN or infinity in"),
    "infinity": (lambda t: t[WEIGHT][0, 0:1].fill_(torch.inf), "NaN or infinity in"),
    "another shape": (lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}), "of shape"),
    "missing": (lambda t: t.pop(WEIGHT), "has no tensor"),
    "one more": (lambda t: t.update(x=torch.zeros(1)), "does not have"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_do_not_fit(small, old, tmp_path, fault):
    change, sentence = TENSOR_FAULTS[fault]
    change_tensors(old / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(old)
    with pytest.raises(CheckpointError, match=sentence):
        resume(small, old, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("optimizer/")], "has no tensor opt"),
        (lambda t: t.pop("optimizer/embed.weight/step"), "has no tensor"),
        (lambda t: t["optimizer/embed.weight/exp_avg"].fill_(torch.nan), "NaN or infinity"),
        (lambda t: t.update({"optimizer/norm.weight/exp_avg": torch.zeros(3)}), "of shape"),
        (lambda t: t.update({"other/x": torch.zeros(1)}), "does not have"),
    ],
)
def test_optimizer_state_that_is_not_complete(small, old, tmp_path, change, sentence):
    change_tensors(old / "training.safetensors", change)
    with pytest.raises(CheckpointError, match=sentence):
        resume(small, old, tmp_path)


def test_a_checkpoint_of_version_1_is_resumed(small, old, tmp_path):
    trainer = resume(dataclasses.replace(small, steps=13), old, tmp_path)
    assert trainer.steps_done == 12
    trainer.run()
    names = sorted(path.name for path in trainer.checkpoint.iterdir())
    assert names == ["latest", "step-00000013"]
    assert read_meta(find_checkpoint(tmp_path)).step == 13


# --- names of a checkpoint ----------------------------------------------------------------------


def test_a_run_its_checkpoints_and_one_checkpoint_are_all_accepted(trained, tmp_path):
    folder = trained / "checkpoint" / "step-00000012"
    named = [trained, trained / "checkpoint", folder, folder / "model.safetensors"]
    named += [trained / "checkpoint" / "latest"]
    for path in named:
        loaded = load_checkpoint(path)
        assert loaded.step == 12
        assert loaded.path == folder
        assert loaded.run == trained
    assert load_checkpoint(trained / "checkpoint" / "step-00000008").step == 8
    alone = shutil.copytree(folder, tmp_path / "published")
    (alone / "training.safetensors").unlink()  # as it is published
    assert load_checkpoint(alone).step == 12
    assert load_checkpoint(alone).run is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", "no such checkpoint directory"),
        ("empty", "it has no config.json"),
        ("file.txt", "is not a checkpoint, which is a folder"),
        ("begun", "holds no checkpoint yet"),
        ("begun/checkpoint", "holds no checkpoint yet"),
        ("unsaved", "its run has none yet"),
        ("dangling", "names step-00000003, which is missing"),
    ],
)
def test_names_that_are_no_checkpoint(trained, tmp_path, name, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "begun" / "checkpoint").mkdir(parents=True)
    (tmp_path / "unsaved").mkdir()
    shutil.copy(trained / "config.json", tmp_path / "unsaved")
    (tmp_path / "dangling" / "checkpoint").mkdir(parents=True)
    (tmp_path / "dangling" / "checkpoint" / "latest").write_text("step-00000003\n")
    with pytest.raises(Bd3lmError, match=sentence):
        load_checkpoint(tmp_path / name)


def test_readers_write_nothing(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "checkpoint" / ".step-00000016.partial").mkdir()
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    load_checkpoint(run)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_loading_does_not_import_the_compiler(trained):
    code = """
import sys
from bd3lm.checkpoint import load_checkpoint
before = set(sys.modules)
load_checkpoint(sys.argv[1])
new = {name for name in set(sys.modules) - before}
assert "torch._dynamo" not in new and "sympy" not in new and len(new) < 20, len(new)
"""
    subprocess.run([sys.executable, "-c", code, trained], check=True, timeout=120)
