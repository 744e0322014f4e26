"""Loggers with the packages that they write for."""

import dataclasses

import pytest

from bd3lm.config import preset
from bd3lm.training import Callback, make_loggers, read_metrics, run_training


class Quiet:
    """A reporter of nothing."""

    def step(self, done, metrics): ...
    def validation(self, step, result): ...
    def scoring(self, done, total): ...
    def note(self, message):
        assert "failed" not in message, message


class Stop(Callback):
    """Interrupt the run at a step."""

    def __init__(self, step):
        self.step = step

    def log(self, step, values):
        if step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def config():
    base = preset("demo")
    return dataclasses.replace(
        base,
        seq_len=32,
        steps=4,
        batch_size=4,
        log_every=1,
        checkpoint_every=2,
        device="cpu",
        model=dataclasses.replace(base.model, width=32, depth=1, heads=2),
        eval=dataclasses.replace(base.eval, every=0, final_rows=8),
        sample=dataclasses.replace(base.sample, num=1, length=8),
    )


def test_tensorboard_reads_the_curves_of_an_interrupted_run(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_training(config, out, Quiet(), callbacks=[*make_loggers(["tensorboard"]), Stop(3)])
    run_training(config, out, Quiet(), resume=True, callbacks=make_loggers(["tensorboard"]))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    lines = read_metrics(out / "metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in read] == [1, 2, 3, 4]
    assert [value for _, value in read] == pytest.approx([loss for _, loss in losses])
    names = events.Tags()["scalars"]
    wanted = "lr grad_norm tokens_per_second mfu data_seconds memory val_nelbo"
    assert set(wanted.split()) <= set(names)


def test_wandb_offline_continues_a_run(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_training(config, out, Quiet(), callbacks=[*make_loggers(["wandb"]), Stop(3)])
    identity = (out / "wandb-id").read_text()
    run_training(config, out, Quiet(), resume=True, callbacks=make_loggers(["wandb"]))
    assert (out / "wandb-id").read_text() == identity
    assert len(list((out / "wandb").glob(f"offline-run-*-{identity}"))) >= 1


def test_trackio_keeps_the_curves(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at its import
    pytest.importorskip("trackio")
    run_training(config, tmp_path / "run", Quiet(), callbacks=make_loggers(["trackio"]))
    assert any((tmp_path / "trackio").rglob("*bd3lm*"))
