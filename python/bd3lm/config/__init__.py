"""Every setting, as a tree of frozen dataclasses that check themselves where they are made.

The command line is derived from these types, and each run writes its resolved tree to
``config.json``. One file holds one part of the tree; ``presets.py`` names whole runs.
"""

from bd3lm.config.check import check, check_number, check_whole
from bd3lm.config.evaluate import (
    MAX_EXACT_BLOCK,
    MAX_MARGINAL_BLOCK,
    EvalConfig,
    check_estimator,
    check_likelihood,
)
from bd3lm.config.lora import LoraConfig
from bd3lm.config.model import ModelConfig, RopeScaling
from bd3lm.config.names import (
    AttentionName,
    DetokenizerName,
    EstimatorName,
    LikelihoodName,
    PackingName,
    ScheduleName,
    SystemName,
    WeightingName,
)
from bd3lm.config.noise import NoiseConfig
from bd3lm.config.objective import ObjectiveConfig
from bd3lm.config.optim import OptimConfig
from bd3lm.config.parallel import ParallelConfig
from bd3lm.config.presets import PRESETS, preset
from bd3lm.config.sample import SampleConfig
from bd3lm.config.serialize import from_dict, to_dict
from bd3lm.config.train import TrainConfig

__all__ = [
    "MAX_EXACT_BLOCK",
    "MAX_MARGINAL_BLOCK",
    "PRESETS",
    "AttentionName",
    "DetokenizerName",
    "EstimatorName",
    "EvalConfig",
    "LikelihoodName",
    "LoraConfig",
    "ModelConfig",
    "NoiseConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PackingName",
    "ParallelConfig",
    "RopeScaling",
    "SampleConfig",
    "ScheduleName",
    "SystemName",
    "TrainConfig",
    "WeightingName",
    "check",
    "check_estimator",
    "check_likelihood",
    "check_number",
    "check_whole",
    "from_dict",
    "preset",
    "to_dict",
]
