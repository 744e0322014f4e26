"""Callbacks and loggers: they see every line of the metrics, and no run fails because of one."""

import csv
import dataclasses
import sys

import pytest
import torch

from bd3lm.errors import ConfigError, InterruptedRunError, MissingPackageError
from bd3lm.ranks.group import ALONE
from bd3lm.training import Callback, make_loggers, read_metrics, run_training
from bd3lm.training.clock import StepClock
from tests.integration.conftest import Silent


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def start(self, run):
        self.events.append(("start", run.step))

    def log(self, step, values):
        self.events.append((step, dict(values)))

    def end(self, summary):
        self.events.append(("end", summary and summary["steps"]))


class Broken(Callback):
    def log(self, step, values):
        raise RuntimeError("no route to host")


class Stopping(Callback):
    def log(self, step, values):
        if step == 3:
            raise KeyboardInterrupt


def table(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lines(out):
    return read_metrics(out / "metrics.jsonl")


def assert_table_holds_the_metrics(out):
    rows = table(out)
    assert len(rows) == len(lines(out))
    for row, line in zip(rows, lines(out), strict=True):
        for name, text in row.items():
            assert text == str(line.get(name, "")), name


def test_a_callback_sees_every_line_and_the_end(config, tmp_path):
    recorder, reporter = Recorder(), Silent()
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=3, rows=4))
    summary = run_training(config, tmp_path / "run", reporter, callbacks=[recorder, Broken()])
    start, *logged, end = recorder.events
    assert (start, end) == (("start", 0), ("end", 6))
    assert [{"step": step, **values} for step, values in logged] == lines(tmp_path / "run")
    losses = [values for _, values in logged if "loss" in values]
    assert len(losses) == 6
    assert all(values["memory"] > 1e7 and values["data_seconds"] >= 0 for values in losses)
    assert [v["val_nelbo"] for _, v in logged if "val_nelbo" in v][-1] == summary["val_nelbo"]
    failed = [note for note in reporter.notes if "Broken failed" in note]
    assert failed == ["Broken failed (RuntimeError: no route to host); the run continues"]


def test_csv_is_that_of_the_metrics_after_resuming(config, tmp_path):
    out = tmp_path / "run"
    config = dataclasses.replace(config, checkpoint_every=2)
    recorder = Recorder()
    callbacks = [*make_loggers(["csv", "csv"]), recorder, Stopping()]
    with pytest.raises((InterruptedRunError, KeyboardInterrupt)):
        run_training(config, out, Silent(), callbacks=callbacks)
    assert recorder.events[-1] == ("end", None)
    run_training(config, out, Silent(), resume=True, callbacks=[*make_loggers(["csv"]), recorder])
    assert_table_holds_the_metrics(out)
    assert [int(row["step"]) for row in table(out) if row["loss"]] == [1, 2, 3, 4, 5, 6]


def test_csv_goes_back_with_the_run(tmp_path):
    from bd3lm.training.callbacks import RunStart
    from bd3lm.training.metrics import MetricsLog

    (logger,) = make_loggers(["csv"])
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    logger.start(RunStart(tmp_path, {}, 0))
    for line in ({"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}):
        metrics.append(line)
        logger.log(line["step"], {"loss": line["loss"]})
    assert_table_holds_the_metrics(tmp_path)
    metrics.rewind(1)
    metrics.append({"step": 1, "rewound_from": 2})
    logger.log(1, {"rewound_from": 2})
    assert_table_holds_the_metrics(tmp_path)


class LateTwin:
    """Two ranks, of which the other waits, works and needs more."""

    size = 2

    def gather(self, mine):
        data, own, memory = mine
        return [mine, (data + 1.0, own + 2.0, memory + 3)]


def test_a_line_is_that_of_the_slowest_rank():
    clock = StepClock()
    for _ in range(3):
        with clock.waiting_for_data():
            pass
        clock.begin()
        clock.arrive()
    line = clock.read(LateTwin(), torch.device("cpu"))
    assert 1.0 <= line["data_seconds"] < 1.5
    assert line["skew"] == pytest.approx(2.0)
    assert clock.read(ALONE, torch.device("cpu")).keys() == {"data_seconds", "memory"}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_extra_is_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=rf"--log {name} needs .* 'bd3lm\[{name}\]'"):
        make_loggers([name])


def test_an_unknown_logger_is_refused():
    with pytest.raises(ConfigError, match=r"log.*mlflow.*csv, tensorboard, wandb, trackio"):
        make_loggers(["mlflow"])
