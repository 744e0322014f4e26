"""Runs whose steps, data, disk, memory or clock fail."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from bd3lm.checkpoint.steps import find_checkpoint
from bd3lm.data import Dataset
from bd3lm.errors import (
    CheckpointError,
    ConfigError,
    CorruptError,
    DiskFullError,
    DivergedError,
    ExistsError,
    InterruptedRunError,
    OutOfMemoryError,
    StorageError,
)
from bd3lm.training import Trainer, read_metrics, run_training, saved_config
from bd3lm.training import trainer as trainer_module
from tests.integration.conftest import Silent
from tests.reliability.test_kills import assert_same_run

PARAMETER = "blocks.0.qkv.weight"


def poison(patch, times):
    """Put one NaN into one gradient at these steps, so many times each."""
    left, clip = dict(times), trainer_module.clip_gradients

    def clipped(parameters, limit):
        step = current[-1].steps_done + 1
        if left.get(step, 0):
            left[step] -= 1
            dict(current[-1].model.named_parameters())[PARAMETER].grad.view(-1)[0] = torch.nan
        return clip(parameters, limit)

    current = []
    step = Trainer.step

    def remembered(self):
        current.append(self)
        return step(self)

    patch.setattr(Trainer, "step", remembered)
    patch.setattr(trainer_module, "clip_gradients", clipped)
    return left


class Notes(Silent):
    """Remembers notes; sends a signal after a step."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after = stop_after

    def step(self, done, metrics):
        if done == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)


def lines(out, key):
    return [line for line in read_metrics(out / "metrics.jsonl") if key in line]


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 6])
def test_one_poisoned_step_is_skipped_and_counted(small, tmp_path, monkeypatch, step):
    """Step 4 is one that is saved."""
    left = poison(monkeypatch, {step: 1})
    notes = Notes()
    run_training(small, tmp_path / "run", notes)
    assert left == {step: 0}
    (line,) = lines(tmp_path / "run", "skipped")
    assert line["step"] == step
    assert line["skipped"] == 1
    assert line["grad_norm"] is None
    assert "loss" not in line
    assert (
        f"step {step} was skipped: the gradient of {PARAMETER} was NaN or infinite" in notes.notes
    )
    for file in (tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "summary.json"):
        assert "NaN" not in file.read_text()


def test_two_in_a_row_go_back_once(small, trained, tmp_path, monkeypatch):
    poison(monkeypatch, {6: 1, 7: 1})
    notes = Notes()
    run_training(small, tmp_path / "run", notes)
    (line,) = lines(tmp_path / "run", "rewound_from")
    assert line == {"step": 4, "rewound_from": 7}
    assert any("going back from step 7 to 4" in note for note in notes.notes)
    assert_same_run(trained, tmp_path / "run")  # the second time nothing was poisoned


def test_the_same_again_is_an_error_that_names_step_and_cause(small, tmp_path, monkeypatch):
    poison(monkeypatch, {6: 9, 7: 9})
    with pytest.raises(DivergedError) as caught:
        run_training(small, tmp_path / "run", Notes())
    message = str(caught.value)
    assert f"the gradient of {PARAMETER} was NaN or infinite at step 6" in message
    assert "again after going back" in message
    assert f"The last checkpoint is of step 4, in {tmp_path / 'run' / 'checkpoint'}" in message


def test_without_a_checkpoint_none_is_named(small, tmp_path, monkeypatch):
    poison(monkeypatch, {1: 9, 2: 9})
    with pytest.raises(
        DivergedError, match=r"at step 1 .* No checkpoint was saved before"
    ) as caught:
        run_training(small, tmp_path / "run", Notes())
    assert "checkpoint is" not in str(caught.value)


@pytest.mark.parametrize("lr", [1e4, 1e20, 1e30, 3e38])
def test_diverging_settings_never_save_what_is_not_finite(small, tmp_path, lr):
    optim = dataclasses.replace(small.optim, optimizer="adamw", lr=lr)
    config = dataclasses.replace(small, optim=optim, checkpoint_every=1, keep=20)
    try:
        run_training(config, tmp_path / "run", Notes())
    except DivergedError as error:
        assert "lower optim.lr" in str(error)
    for folder in (tmp_path / "run" / "checkpoint").glob("step-*"):
        for name in ("model", "training"):
            from safetensors.torch import load_file

            for key, tensor in load_file(folder / f"{name}.safetensors").items():
                assert tensor.isfinite().all(), (folder.name, key)
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_losses_of_skipped_steps_do_not_reach_the_learned_noise(small, tmp_path, monkeypatch):
    monkeypatch.setattr("bd3lm.systems.learned_noise.EVERY", 2)
    noise = dataclasses.replace(small.noise, fit_counts=True)
    config = dataclasses.replace(small, noise=noise, steps=4)
    data = Path(config.data)
    trainer = Trainer(config, Dataset(data / "train"), Dataset(data / "valid"), tmp_path, Silent())
    with torch.no_grad():
        weight = trainer.model.blocks[0].qkv.weight
        kept = weight.clone()
        weight.fill_(torch.inf)
    trainer.step()
    with torch.no_grad():
        weight.copy_(kept)
    trainer.step()
    trainer.batches.close()
    assert trainer.guard.look(torch.tensor(1.0)).cause == "the loss"
    assert all(probability > 0 for probability in trainer.system.state()["counts"]["probs"])


# --- stop, resume, extend -----------------------------------------------------------------------


def stopped(config, out, after):
    with pytest.raises(InterruptedRunError, match=rf"after step {after} of .*--resume") as caught:
        run_training(config, out, Notes(stop_after=after))
    assert caught.value.exit_code == 130


def test_resume_is_always_safe_to_say(small, trained, tmp_path):
    """Resume without a run, before the first save, in the middle, and at the end."""
    out = tmp_path / "run"
    stopped(small, out, 5)
    shutil.rmtree(out / "checkpoint")  # as if killed before the first checkpoint
    (out / "data").mkdir()
    run_training(small, out, Silent(), resume=True)
    assert_same_run(trained, out)
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    notes = Notes()
    assert run_training(small, out, notes, resume=True)["steps"] == 12
    assert any("has ended already" in note for note in notes.notes)
    after = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    assert [a for a in after if a[0].is_file() and a[0].name != ".lock"] == [
        b for b in before if b[0].is_file() and b[0].name != ".lock"
    ]
    run_training(small, tmp_path / "new", Silent(), resume=True)
    assert_same_run(trained, tmp_path / "new")


def test_the_last_validation_is_made_once(small, trained, tmp_path):
    """Killed after the validation and before the summary."""
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "summary.json").unlink()
    run_training(small, out, Silent(), resume=True)
    assert_same_run(trained, out)


def test_a_run_is_extended(small, trained, tmp_path):
    longer = dataclasses.replace(small, steps=16)
    out = shutil.copytree(trained, tmp_path / "run")
    run_training(longer, out, Silent(), resume=True)
    assert find_checkpoint(out).name == "step-00000016"
    assert saved_config(out).steps == 16
    assert [line["step"] for line in lines(out, "val_nelbo")] == [12, 16]
    stopped(longer, tmp_path / "parts", 12)
    assert json.loads((out / "summary.json").read_text())["steps"] == 16
    with pytest.raises(ConfigError, match=r"steps = 14: must be at least 16, as in the run"):
        run_training(dataclasses.replace(small, steps=14), out, Silent(), resume=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 8}, r"batch-size = 8: must be 4, as in the run that is resumed"),
        ({"seed": 2}, r"seed = 2: must be 1.*--init-from"),
        ({"model": {"dropout": 0.5}}, r"model\.dropout = 0\.5: must be 0\.0"),
    ],
)
def test_other_settings_are_refused_in_one_sentence(small, trained, tmp_path, changes, sentence):
    out = shutil.copytree(trained, tmp_path / "run")
    if "model" in changes:
        changes = {"model": dataclasses.replace(small.model, **changes["model"])}
    with pytest.raises(ConfigError, match=sentence):
        run_training(dataclasses.replace(small, **changes), out, Silent(), resume=True)


def test_checkpoints_by_the_minute_change_nothing_else(small, trained, tmp_path, monkeypatch):
    saves, save = [], Trainer.save
    monkeypatch.setattr(
        Trainer, "save", lambda self, **how: saves.append(self.steps_done) or save(self, **how)
    )
    config = dataclasses.replace(small, checkpoint_minutes=1e-9)
    run_training(config, tmp_path / "run", Silent())
    assert saves == list(range(1, 13))
    assert_same_run(trained, tmp_path / "run")


def test_the_best_validation_stays(small, tmp_path):
    config = dataclasses.replace(
        small, eval=dataclasses.replace(small.eval, every=2, rows=2), keep=1, checkpoint_every=100
    )
    out = tmp_path / "run"
    run_training(config, out, Silent())
    quick = [line for line in lines(out, "val_nelbo") if line["step"] < 12]
    best = min(quick, key=lambda line: line["val_nelbo"])["step"]
    assert find_checkpoint(out / "checkpoint" / "best").name == f"step-{best:08d}"
    assert find_checkpoint(out).name == "step-00000012"


def test_a_directory_in_use_is_refused(small, tmp_path):
    from bd3lm.training.directory import run_directory

    out = tmp_path / "run"
    with run_directory(out, resume=False):
        for resume in (False, True):
            with pytest.raises(ExistsError, match=rf"another process \(process {os.getpid()} on"):
                run_training(small, out, Silent(), resume=resume)
    assert not out.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_fails_to_start_removes_nothing_else(small, tmp_path, resume):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    bad = dataclasses.replace(small, data=str(tmp_path / "gone"))
    with pytest.raises(ExistsError, match="is not empty and holds no run"):
        run_training(bad, tmp_path / "out", Silent(), resume=resume)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_directories_that_hold_something_else(small, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ExistsError, match="is not empty and holds no run"):
        run_training(small, tmp_path / "full", Silent())
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExistsError, match="is a file; choose another --out"):
        run_training(small, tmp_path / "file", Silent())
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        saved_config(tmp_path / "full")


# --- data ---------------------------------------------------------------------------------------


def changing(small, tmp_path, change):
    """Train; after step 5 the data is changed."""
    data = shutil.copytree(small.data, tmp_path / "data")

    class Change(Notes):
        def step(self, done, metrics):
            if done == 5:
                change(data)

    reporter = Change()
    config = dataclasses.replace(small, data=str(data))
    return config, reporter


def test_data_that_is_removed_is_read_to_the_end(small, trained, tmp_path):
    config, reporter = changing(small, tmp_path, shutil.rmtree)
    run_training(config, tmp_path / "run", reporter)
    assert any("tokens.bin was removed or replaced" in note for note in reporter.notes)
    assert_same_run(trained, tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_data_that_is_overwritten_ends_the_run(small, tmp_path, split):
    def overwrite(data):
        file = data / split / "tokens.bin"
        content = file.read_bytes()
        time.sleep(0.01)
        file.write_bytes(content[::-1])

    config, reporter = changing(small, tmp_path, overwrite)
    with pytest.raises(
        CorruptError, match=r"tokens\.bin was changed while the run read it"
    ) as caught:
        run_training(config, tmp_path / "run", reporter)
    assert "The last checkpoint is of step 4" in str(caught.value)


def test_other_data_is_not_resumed_on(small, tmp_path):
    data = shutil.copytree(small.data, tmp_path / "data")
    config = dataclasses.replace(small, data=str(data))
    stopped(config, tmp_path / "run", 5)
    moved = data.rename(tmp_path / "moved")
    elsewhere = dataclasses.replace(config, data=str(moved))
    shutil.copytree(moved / "valid", data / "train")
    shutil.copytree(moved / "valid", data / "valid")
    with pytest.raises(CheckpointError, match=r"data/train is not the data that this run was"):
        run_training(config, tmp_path / "run", Silent(), resume=True)
    run_training(elsewhere, tmp_path / "run", Silent(), resume=True)  # the same data is


# --- the machine --------------------------------------------------------------------------------


def test_a_clock_that_stands_still(small, tmp_path, monkeypatch):
    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, name, lambda: 100.0)
    summary = run_training(small, tmp_path / "run", Silent())
    assert summary["tokens_per_second"] == summary["mfu"] == 0.0


def test_a_disk_that_fills_while_logging(small, trained, tmp_path, monkeypatch):
    """Saving is tried; where it works too little is lost, and resuming gives the same run."""
    from bd3lm.training.metrics import MetricsLog

    append = MetricsLog.append

    def full(self, line):
        if line["step"] == 7:
            raise DiskFullError(f"{self.file}: no space left on the device")
        append(self, line)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", full)
        with pytest.raises(DiskFullError, match=r"no space left .*is of step 7"):
            run_training(small, out, Silent())
    run_training(small, out, Silent(), resume=True)
    assert find_checkpoint(out).name == "step-00000012"


@pytest.mark.parametrize(
    ("raised", "kind", "sentence"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
            OutOfMemoryError,
            "micro",
        ),
        (MemoryError(), OutOfMemoryError, "not enough memory for this run"),
        (RuntimeError("could not create a primitive"), OutOfMemoryError, "not enough memory"),
        (RuntimeError("can't start new thread"), OutOfMemoryError, "not enough memory"),
        (
            OSError(errno.EIO, "Input/output error", "/x/y"),
            StorageError,
            "/x/y: Input/output error",
        ),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), DiskFullError, "/x/y: no space left"),
    ],
)
def test_failures_of_the_machine_are_one_sentence(
    small, tmp_path, monkeypatch, raised, kind, sentence
):
    def fails(self):
        raise raised

    monkeypatch.setattr(Trainer, "step", fails)
    with pytest.raises(kind, match=sentence) as caught:
        run_training(small, tmp_path / "run", Silent())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"seed": True},
        {"steps": 1.5},
        {"steps": 2**80},
        {"log_every": 0},
        {"keep": 0},
        {"checkpoint_minutes": 0.0},
        {"checkpoint_minutes": float("nan")},
        {"micro_batch": 0},
        {"seq_len": 2**40},
    ],
)
def test_every_number_of_a_run_is_checked(small, changes):
    with pytest.raises(ConfigError, match=r"= .*: must be ."):
        dataclasses.replace(small, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"every": -1},
        {"rows": 0},
        {"repeats": 0},
        {"batch_size": 0},
        {"batch_size": -3},
        {"stride": 0},
    ],
)
def test_every_number_of_a_validation_is_checked(small, changes):
    with pytest.raises(ConfigError, match=r"eval\..* = .*: must be at least"):
        dataclasses.replace(small.eval, **changes)


def test_large_seeds_train_with_dropout(small, tmp_path):
    config = dataclasses.replace(
        small, seed=2**63 - 1, steps=2, model=dataclasses.replace(small.model, dropout=0.2)
    )
    run_training(config, tmp_path / "run", Silent())
