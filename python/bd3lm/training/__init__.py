"""The training loop and what it needs."""

from bd3lm.training.run import run_training, saved_config, train_only
from bd3lm.training.trainer import InterruptedRunError, Reporter, Trainer

__all__ = [
    "InterruptedRunError",
    "Reporter",
    "Trainer",
    "run_training",
    "saved_config",
    "train_only",
]
