"""The training loop and what it needs."""

from bd3lm.training.run import run_training, saved_config, train_only
from bd3lm.training.trainer import Reporter, Trainer

__all__ = [
    "Reporter",
    "Trainer",
    "run_training",
    "saved_config",
    "train_only",
]
