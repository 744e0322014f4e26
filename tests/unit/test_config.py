"""Settings: the JSON round trip, presets, and refusals."""

import dataclasses
from typing import get_args

import pytest

from bd3lm.config import (
    PRESETS,
    EvalConfig,
    LoraConfig,
    OptimConfig,
    TrainConfig,
    from_dict,
    preset,
    to_dict,
)
from bd3lm.config.names import AttentionName, EstimatorName, LikelihoodName, SystemName
from bd3lm.errors import ConfigError
from bd3lm.evaluate.likelihood import Measure
from bd3lm.model.attention import BACKENDS
from bd3lm.systems import SYSTEMS, BlockDiffusion
from tests.conftest import MASK_ID, tiny_model


def test_names_are_those_of_the_code():
    assert list(get_args(AttentionName)) == ["auto", *BACKENDS]
    assert list(get_args(SystemName)) == list(SYSTEMS)
    model, system = tiny_model(), BlockDiffusion(4, MASK_ID)
    for likelihood in get_args(LikelihoodName):
        Measure(likelihood, "exact", 2, 0, None).check(system, model)
    for estimator in get_args(EstimatorName):
        Measure("nelbo", estimator, 2, 0, None).check(system, model)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    cfg = preset(name)
    assert from_dict(TrainConfig, to_dict(cfg)) == cfg


def test_tuples_and_none_survive_json():
    cfg = preset("demo")
    noise = dataclasses.replace(cfg.noise, clip=(0.3, 0.8), estimator="bernoulli")
    cfg = dataclasses.replace(cfg, noise=noise, micro_batch=8)
    back = from_dict(TrainConfig, to_dict(cfg))
    assert back.noise.clip == (0.3, 0.8)
    assert back == cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 5}, "block-size = 5: must be a divisor of seq-len = 128"),
        ({"seq_len": 1, "block_size": 1}, "seq-len = 1"),
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"micro_batch": 3}, "micro-batch = 3: must be a divisor of batch-size = 512"),
        (
            {"eval": EvalConfig(repeats=3), "block_size": 8},
            "eval.repeats = 3: must be an even number",
        ),
        (
            {"eval": EvalConfig(estimator="count", repeats=1)},
            "eval.repeats = 1: must be at least 2",
        ),
        (
            {"row_eos": True, "packing": "aligned"},
            "row-eos = True: must be False with packing = aligned",
        ),
        ({"eval": EvalConfig(stride=64), "row_eos": True}, "other rows do not overlap"),
        ({"lora": LoraConfig(rank=4)}, r"init-from \(not given\): must be a checkpoint with lora"),
        (
            {"lora": LoraConfig(rank=4), "init_from": "x", "optim": OptimConfig(optimizer="muon")},
            "optim.optimizer = muon: must be adamw with lora.rank",
        ),
    ],
)
def test_wrong_values_name_field_value_and_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="one of demo, joint, tiny, small, medium"):
        preset("huge")
    values = to_dict(preset("demo"))
    values["colour"] = "blue"
    with pytest.raises(
        ConfigError, match="colour = blue: must be left out: TrainConfig has no such setting"
    ):
        from_dict(TrainConfig, values)
