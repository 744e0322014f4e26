"""Whole runs: their files, and that stopping changes nothing."""

import dataclasses
import errno
import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.native import read_meta
from bd3lm.checkpoint.steps import find_checkpoint
from bd3lm.data import Dataset
from bd3lm.data.resolve import open_splits
from bd3lm.errors import (
    CheckpointError,
    ConfigError,
    DiskFullError,
    ExistsError,
    InterruptedRunError,
)
from bd3lm.training import Trainer, run_training, saved_config
from tests.integration.conftest import Silent

SUMMARY = {
    "system",
    "block_size",
    "steps",
    "tokens",
    "seconds",
    "tokens_per_second",
    "mfu",
    "val_nelbo",
    "val_ppl",
    "val_bpb",
    "estimator",
    "nfe",
    "checkpoint",
}


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(out):
    return [line["loss"] for line in metrics(out) if "loss" in line]


def weights(out):
    return load_file(find_checkpoint(out) / "model.safetensors")


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_run_leaves_everything_and_its_numbers_agree(config, tmp_path):
    out = tmp_path / "run"
    summary = run_training(config, out, Silent())
    assert summary.keys() >= SUMMARY
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["tokens"] == 6 * 8 * 32
    assert summary["estimator"] == "exact"
    assert summary["val_coverage"] == 1.0
    assert (out / "samples.txt").read_text().strip()
    lines = losses(out)
    assert lines[0] == pytest.approx(torch.tensor(16383.0).log().item(), rel=0.05)
    assert lines[-1] < lines[0]
    loaded = load_checkpoint(out / "checkpoint")
    assert loaded.config == config
    assert loaded.step == 6
    assert saved_config(out) == config


def test_resume_continues_bitwise(config, tmp_path):
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=2))
    run_training(config, tmp_path / "whole", Silent())
    _stopped(config, tmp_path / "parts", after=4)
    again = saved_config(tmp_path / "parts")
    assert again == config
    run_training(again, tmp_path / "parts", Silent(), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def _stopped(config, out, after):
    """Ctrl-C while step ``after`` runs."""
    import os
    import signal

    class Press(Silent):
        def step(self, done, metrics):
            if done == after:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError, match=f"after step {after} of 6.*--resume"):
        run_training(config, out, Press())


def test_a_resumed_run_counts_no_tokens(config, tmp_path, monkeypatch):
    """Its weights hold what was counted; in object storage all of the text would be read."""
    config = dataclasses.replace(config, init_unigram=True)
    run_training(config, tmp_path / "whole", Silent())
    _stopped(config, tmp_path / "parts", after=3)
    monkeypatch.delattr(Dataset, "token_counts")
    run_training(config, tmp_path / "parts", Silent(), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(AttributeError):
        run_training(config, tmp_path / "other", Silent())


def test_dropout_resumes_bitwise_too(config, tmp_path):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.2))
    run_training(config, tmp_path / "whole", Silent())
    _stopped(config, tmp_path / "parts", after=3)
    run_training(config, tmp_path / "parts", Silent(), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_accumulated_gradients_are_those_of_the_whole_batch(config, tmp_path):
    config = dataclasses.replace(config, precision="fp32", steps=3)
    parts = dataclasses.replace(config, micro_batch=2)
    run_training(config, tmp_path / "whole", Silent())
    run_training(parts, tmp_path / "parts", Silent())
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-4)


@pytest.mark.parametrize(
    "noise",
    [
        {"clip_search": True},
        {"clip_search": True, "estimator": "bernoulli", "resample": True},
        {"fit_counts": True},
        {"fit_counts": True, "clip_search": True},
        {"frequency_gap": 0.5, "estimator": "bernoulli"},
    ],
)
def test_what_was_learned_of_the_noise_resumes_bitwise(config, tmp_path, monkeypatch, noise):
    """A law and a clip that are new at step 2, and a stop at step 3."""
    monkeypatch.setattr("bd3lm.systems.learned_noise.EVERY", 2)
    config = dataclasses.replace(
        config,
        noise=dataclasses.replace(config.noise, **noise),
        eval=dataclasses.replace(config.eval, every=2, rows=4, repeats=2),
    )
    run_training(config, tmp_path / "whole", Silent())
    _stopped(config, tmp_path / "parts", after=3)
    learned = load_checkpoint(tmp_path / "parts" / "checkpoint").learned
    searched = [tuple(line["clip"]) for line in metrics(tmp_path / "parts") if "clip" in line]
    if "clip_search" in noise:
        assert [tuple(learned["clip"])] == searched
    if "fit_counts" in noise:
        assert sum(learned["counts"]["probs"]) == pytest.approx(1.0)
        assert learned["counts"]["probs"] != [0.25] * 4
    run_training(saved_config(tmp_path / "parts"), tmp_path / "parts", Silent(), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    clips = [
        [(line["step"], line["clip"]) for line in metrics(tmp_path / name) if "clip" in line]
        for name in ("whole", "parts")
    ]
    assert clips[0] == clips[1]
    assert len(clips[0]) == (3 if "clip_search" in noise else 0)
    if len(noise) == 1 and "frequency_gap" not in noise:  # used from step 3 on
        plain = dataclasses.replace(config, noise=type(config.noise)(), steps=3)
        run_training(plain, tmp_path / "plain", Silent())
        first, second = losses(tmp_path / "whole"), losses(tmp_path / "plain")
        assert first[:2] == second[:2]
        assert first[2] != second[2]


@pytest.mark.parametrize("packing", ["aligned", "best_fit"])
@pytest.mark.parametrize("block_size", [1, 32])
def test_other_packings_and_block_sizes_train(config, tmp_path, packing, block_size):
    config = dataclasses.replace(config, packing=packing, block_size=block_size, steps=2)
    summary = run_training(config, tmp_path / "run", Silent())
    assert summary["val_coverage"] == 1.0
    assert summary["estimator"] == ("exact" if block_size == 1 else "stratified")
    assert torch.tensor(losses(tmp_path / "run")).isfinite().all()


def test_a_text_file_is_tokenized_and_split(config, tmp_path):
    from tests.integration.conftest import story

    text = tmp_path / "stories.jsonl"
    text.write_text("".join(json.dumps({"text": story(i)}) + "\n" for i in range(40)))
    config = dataclasses.replace(config, data=str(text), steps=1)
    run_training(config, tmp_path / "run", Silent())
    assert (tmp_path / "run" / "data" / "valid" / "manifest.json").exists()


def test_a_run_is_not_overwritten_and_a_failed_start_leaves_nothing(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ExistsError, match="already holds a run"):
        run_training(config, tmp_path / "run", Silent())
    bad = dataclasses.replace(config, data=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_training(bad, tmp_path / "new", Silent())
    assert not (tmp_path / "new").exists()
    long = dataclasses.replace(config, seq_len=1 << 20)
    with pytest.raises(ConfigError, match="do not fill one row"):
        run_training(long, tmp_path / "new", Silent())
    assert not (tmp_path / "new").exists()


def test_nothing_to_resume_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        saved_config(tmp_path)


def finish(trainer):
    trainer.save()
    trainer.finish_save()


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_keeps_the_old_checkpoint(config, tmp_path, monkeypatch, background):
    from bd3lm.checkpoint import tensors

    splits = open_splits(config.data, None, "default", tmp_path / "work", print)
    trainer = Trainer(config, splits.train, splits.valid, tmp_path, Silent())
    trainer.saver.background = background
    trainer.step()
    finish(trainer)
    before = weights(tmp_path)

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer.step()
    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(DiskFullError, match=r"no space left.*The last checkpoint is of step 1"):
        finish(trainer)
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, before[name])
    assert sorted(p.name for p in trainer.checkpoint.iterdir()) == ["latest", "step-00000001"]


def test_a_checkpoint_in_the_background_is_of_the_step_that_was_saved(
    config, tmp_path, monkeypatch
):
    """Training goes on while it is written."""
    from bd3lm.training import persistence

    splits = open_splits(config.data, None, "default", tmp_path / "work", print)
    trainer = Trainer(config, splits.train, splits.valid, tmp_path, Silent())
    trainer.saver.background = True
    trained, write = threading.Event(), persistence.write_checkpoint

    def late(*args, **options):
        assert trained.wait(60)
        write(*args, **options)

    monkeypatch.setattr(persistence, "write_checkpoint", late)
    trainer.step()
    trainer.save()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moments = {name: t.clone() for name, t in trainer.optimizers.state().items()}
    averaged = {name: t.clone() for name, t in trainer.ema.weights.items()}
    trainer.step()
    assert trainer.saver.saved < trainer.saver.begun == 1
    trained.set()
    trainer.finish_save()
    assert trainer.saver.saved == 1
    meta = read_meta(find_checkpoint(tmp_path))
    saved = meta.tensors("training.safetensors").load()
    for prefix, tensors in (("model/", before), ("optimizer/", moments)):
        for name, tensor in tensors.items():
            assert torch.equal(saved[prefix + name], tensor)
    for name, tensor in meta.tensors("model.safetensors").load().items():
        assert torch.equal(averaged[name], tensor)


def test_a_profile_says_where_a_step_went(config, tmp_path):
    out = tmp_path / "run"
    summary = run_training(config, out, Silent(), profile=True)
    profile = json.loads((out / "profile.json").read_text())
    assert profile == summary["profile"]
    parts = profile["components"]
    assert parts.keys() >= {"attention", "matrix products", "head and loss", "optimizer", "data"}
    assert all(value >= 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(profile["seconds"], rel=0.2)
    assert 0 < summary["mfu"] < 1
