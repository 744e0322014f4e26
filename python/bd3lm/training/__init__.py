"""The training loop, and the life of a run on disk."""

from bd3lm.training.directory import holds_run
from bd3lm.training.metrics import read_metrics
from bd3lm.training.reporter import Reporter
from bd3lm.training.run import run_training, saved_config, train_only
from bd3lm.training.trainer import Trainer

__all__ = [
    "Reporter",
    "Trainer",
    "holds_run",
    "read_metrics",
    "run_training",
    "saved_config",
    "train_only",
]
