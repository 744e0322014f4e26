"""All systems through the same commands, and one run that begins where another ended."""

import dataclasses
import json
import signal

import pytest
import torch

from bd3lm.checkpoint import load_checkpoint
from bd3lm.cli import evaluate, sample, train
from bd3lm.config import preset
from bd3lm.data import Dataset, Loader, NoiseSpec, Rows, Schedule
from bd3lm.data.resolve import open_splits
from bd3lm.errors import CheckpointError, ConfigError
from bd3lm.training import Trainer, run_training
from tests.integration.conftest import Silent
from tests.integration.test_train import assert_same_run


def settings(config, system):
    """The fixture's small run, for another system."""
    model = preset("demo", system).model
    return dataclasses.replace(
        config,
        system=system,
        model=dataclasses.replace(model, width=32, depth=2, heads=2),
        sample=dataclasses.replace(config.sample, num=1, steps=4 if system == "sedd" else None),
        eval=dataclasses.replace(config.eval, repeats=2),
    )


TINY = (
    "--seq-len 32 --steps 6 --batch-size 8 --device cpu --log-every 1 --eval.every 0 "
    "--eval.repeats 2 --model.width 32 --model.depth 2 --model.heads 2 "
    "--sample.num 1 --sample.length 24"
).split()


@pytest.mark.parametrize("system", ["bd3lm", "mdlm", "sedd", "ar"])
def test_a_system_by_the_command_line(corpus, tmp_path, capsys, monkeypatch, system):
    """Trained, stopped by Ctrl-C, resumed, scored and sampled as a user does it."""

    def trained(name):
        return ["--system", system, "--data", str(corpus), "--out", str(tmp_path / name), *TINY]

    train.main(["demo", *trained("whole")])
    assert "bits per byte" in capsys.readouterr().out
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["system"] == system
    assert summary["block_size"] == {"bd3lm": 4, "ar": 1, "mdlm": 32, "sedd": 32}[system]
    assert summary["val_coverage"] == 1.0

    step = Trainer.step

    def third_is_the_last(trainer):
        if trainer.steps_done == 2:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", third_is_the_last)
        with pytest.raises(SystemExit) as stop:
            train.main(["demo", *trained("parts")])
    assert stop.value.code == 130
    told = " ".join(capsys.readouterr().err.split())
    assert "stopped after step 3 of 6; the run is saved" in told
    train.main(["--out", str(tmp_path / "parts"), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    checkpoint, valid = tmp_path / "whole" / "checkpoint", str(corpus / "valid")
    capsys.readouterr()
    evaluate.main([str(checkpoint), "--data", valid, "--repeats", "2", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["system"] == system
    # The run scored in bf16 where the processor has it.
    assert record["nelbo"] == pytest.approx(summary["val_nelbo"], rel=2e-2)
    sample.main([str(checkpoint), "--num", "2", "--length", "16", "--steps", "3", "--json"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(r["ids"]) <= 15 for r in records] == [True, True]
    if system != "bd3lm":
        with pytest.raises(SystemExit):
            evaluate.main([str(checkpoint), "--data", valid, "--block-size", "8"])
        assert f"for system = {system}" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("packing", [{"row_eos": True}, {"packing": "aligned"}])
def test_rows_are_scored_as_they_are_trained(config, tmp_path, capsys, packing):
    """Score by validation and by the command: every token once, EOS of rows besides."""
    cfg = dataclasses.replace(config, **packing)
    summary = run_training(cfg, tmp_path / "run", Silent())
    assert summary["val_coverage"] == 1.0
    valid = f"{cfg.data}/valid"
    tokens = Dataset(valid).manifest.num_tokens
    rows = -(-tokens // 30) if cfg.row_eos else 0
    assert summary["val_tokens"] == tokens + rows
    evaluate.main([str(tmp_path / "run" / "checkpoint"), "--data", valid, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert (record["tokens"], record["coverage"]) == (tokens + rows, 1.0)
    assert record["nelbo"] == pytest.approx(summary["val_nelbo"], rel=2e-2)
    with pytest.raises(ConfigError, match="other rows do not overlap"):
        dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, stride=16))


def losses_of(model, system, data, seq_len):
    rows = Rows(data, seq_len=seq_len, block_size=system.block_size)
    batch = Loader(rows, 8, 1).batch(0, NoiseSpec(Schedule("loglinear"), estimator="count"))
    with torch.no_grad():
        return system.loss(model, batch) / batch.num_noisable


def test_finetuning_begins_with_the_averaged_weights(config, tmp_path):
    """S = L first, then S = 4 with another schedule and clip."""
    first = settings(config, "mdlm")
    run_training(first, tmp_path / "pre", Silent())
    source = tmp_path / "pre" / "checkpoint"
    noise = dataclasses.replace(config.noise, estimator="bernoulli", clip=(0.3, 0.8))
    cfg = dataclasses.replace(config, init_from=str(source), noise=noise)
    splits = open_splits(cfg.data, None, "default", tmp_path, print)
    trainer = Trainer(cfg, splits.train, splits.valid, tmp_path, Silent())
    trainer.start_from(source)
    loaded = load_checkpoint(source)
    system = trainer.system
    mine = losses_of(trainer.model.eval(), system, splits.valid, 32)
    theirs = losses_of(loaded.model, system, splits.valid, 32)
    assert torch.equal(mine, theirs)
    with trainer.ema.applied():
        assert torch.equal(losses_of(trainer.model, system, splits.valid, 32), theirs)
    assert trainer.steps_done == 0

    summary = run_training(cfg, tmp_path / "fine", Silent())
    assert summary["init_from"] == str(source)
    assert summary["block_size"] == 4
    assert json.loads((tmp_path / "fine" / "config.json").read_text())["init_from"] == str(source)
    cold = run_training(dataclasses.replace(cfg, init_from=None), tmp_path / "cold", Silent())
    assert summary["val_nelbo"] < cold["val_nelbo"]


def test_finetuning_may_keep_the_optimizer(config, tmp_path):
    run_training(config, tmp_path / "pre", Silent())
    source = tmp_path / "pre" / "checkpoint"
    splits = open_splits(config.data, None, "default", tmp_path, print)
    states = []
    for keep in (False, True):
        cfg = dataclasses.replace(config, init_from=str(source), init_optimizer=keep)
        trainer = Trainer(cfg, splits.train, splits.valid, tmp_path, Silent())
        trainer.start_from(source)
        states.append(trainer.optimizers.state())
    assert all(value.abs().sum() == 0 for value in states[0].values())
    assert any(value.abs().sum() > 0 for name, value in states[1].items() if "exp_avg" in name)


def test_a_source_that_does_not_fit_is_refused(config, tmp_path):
    run_training(config, tmp_path / "pre", Silent())
    source = str(tmp_path / "pre" / "checkpoint")
    wide = dataclasses.replace(config.model, width=64)
    heads = dataclasses.replace(config.model, heads=1)  # every tensor would fit
    gelu = dataclasses.replace(config.model, mlp="gelu")
    adamw = dataclasses.replace(config.optim, optimizer="adamw")
    cases = [
        ({"model": wide}, CheckpointError, "this model needs"),
        ({"model": heads}, CheckpointError, "was trained with model.heads = 2; this model has 1"),
        ({"model": gelu}, CheckpointError, "was trained with model.mlp = relu2; this model has"),
        ({"init_from": "nowhere"}, Exception, "nowhere: no such checkpoint"),
        ({"optim": adamw, "init_optimizer": True}, CheckpointError, "another optimizer's state"),
    ]
    for index, (changes, kind, sentence) in enumerate(cases):
        cfg = dataclasses.replace(config, **({"init_from": source} | changes))
        with pytest.raises(kind, match=sentence):
            run_training(cfg, tmp_path / f"fine{index}", Silent())
        assert not (tmp_path / f"fine{index}").exists()
    with pytest.raises(ConfigError, match="must be False without init-from"):
        dataclasses.replace(config, init_optimizer=True)
