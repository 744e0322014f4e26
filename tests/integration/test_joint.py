"""A run that is autoregressive and block-diffusive: its log, its resume, its commands."""

import dataclasses
import json

import pytest

from bd3lm.checkpoint import load_checkpoint
from bd3lm.cli import evaluate, export, sample
from bd3lm.config import ObjectiveConfig
from bd3lm.errors import ConfigError
from bd3lm.training import run_training
from tests.integration.conftest import Silent
from tests.integration.test_train import _stopped, assert_same_run, metrics


@pytest.fixture
def joint(config):
    """All parts of the objective at once: a warm start, three sizes, learned noise of each."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, clean_stream="causal"),
        objective=ObjectiveConfig(ar_weight=1.0, ar_steps=1, block_sizes=(2, 4, 8)),
        noise=dataclasses.replace(config.noise, fit_counts=True, clip_search=True),
        eval=dataclasses.replace(config.eval, every=2, rows=4, repeats=2),
    )


def test_a_joint_run_resumes_bitwise(joint, tmp_path, monkeypatch):
    monkeypatch.setattr("bd3lm.systems.learned_noise.EVERY", 2)
    joint = dataclasses.replace(joint, log_every=4)  # a stop inside a window of the log
    run_training(joint, tmp_path / "whole", Silent())
    _stopped(joint, tmp_path / "parts", after=3)
    run_training(joint, tmp_path / "parts", Silent(), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    logs = [
        [
            {k: v for k, v in line.items() if k.startswith(("loss_", "val_nelbo", "clip"))}
            for line in metrics(tmp_path / name)
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    names = {name for line in logs[0] for name in line}
    assert {"loss_ar", "val_nelbo", "val_nelbo_S2", "val_nelbo_S8", "clip", "clip_S2"} <= names
    learned = load_checkpoint(tmp_path / "parts").learned
    assert len(learned["sizes"]["8"]["counts"]["probs"]) == 8


def test_one_checkpoint_scores_and_samples_in_every_way(joint, tmp_path, capsys):
    run_training(joint, tmp_path / "run", Silent())
    run = str(tmp_path / "run")

    def scored(*options):
        capsys.readouterr()
        evaluate.main([run, "--rows", "4", "--json", *options])
        return json.loads(capsys.readouterr().out)

    exact = [scored("--block-size", str(size), "--estimator", "exact") for size in (1, 2, 4)]
    ar = scored("--as-ar")
    assert [found["block_size"] for found in exact] == [1, 2, 4]
    assert (ar["block_size"], ar["forwards"]) == (1, 1)
    assert all(abs(found["nelbo"] - ar["nelbo"]) < 1.0 for found in exact)

    def drawn(*options):
        capsys.readouterr()
        sample.main([run, "--length", "20", "--temperature", "0", "--json", *options])
        return json.loads(capsys.readouterr().out)

    assert drawn("--as-ar")["ids"] == drawn("--speculate")["ids"]
    assert drawn("--block-size", "8")["nfe"] > 0
    export.main([run, str(tmp_path / "hf"), "--layout", "hf", "--as-ar"])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["causal"]
    for layout in ("hf", "sdar"):
        with pytest.raises(SystemExit):
            export.main([run, str(tmp_path / layout / "x"), "--layout", layout])
        assert "model.clean-stream = causal: must be block" in capsys.readouterr().err


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(ar_weight=1.0, views=2, block_sizes=(1, 2, 4)),
        ObjectiveConfig(ar_weight=1.0, block_sizes=(1, 2, 4), ramp_steps=2),
    ],
    ids=["views", "ramp"],
)
def test_a_run_of_several_sizes_is_scored_at_each(config, objective, tmp_path, capsys):
    """At S = 1 a step has one view, and a size by itself has no ramp."""
    cfg = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, clean_stream="causal"),
        objective=objective,
        eval=dataclasses.replace(config.eval, every=2, rows=4),
    )
    run_training(cfg, tmp_path, Silent())
    logged = {name for line in metrics(tmp_path) for name in line}
    assert {"val_nelbo", "val_nelbo_S1", "val_nelbo_S2"} <= logged
    for options in ([], ["--block-size", "1"], ["--block-size", "2"], ["--block-size", "8"]):
        capsys.readouterr()
        evaluate.main([str(tmp_path), "--rows", "4", "--json", *options])
        assert json.loads(capsys.readouterr().out)["nelbo"] > 0


def test_a_clip_that_one_of_the_sizes_cannot_have_is_refused_first(config, tmp_path):
    noise = dataclasses.replace(config.noise, estimator="bernoulli", clip=(0.3, 0.4), resample=True)
    cfg = dataclasses.replace(
        config, block_size=16, noise=noise, objective=ObjectiveConfig(block_sizes=(2, 16))
    )
    with pytest.raises(ConfigError, match="must be around a k/2"):
        run_training(cfg, tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()
