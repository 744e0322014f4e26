"""The training loop, and the life of a run on disk."""

from typing import TYPE_CHECKING

from bd3lm.lazy import imported_on_use

if TYPE_CHECKING:
    from bd3lm.training.callbacks import Callback, RunStart
    from bd3lm.training.directory import holds_run
    from bd3lm.training.loggers import make_loggers
    from bd3lm.training.metrics import read_metrics
    from bd3lm.training.reporter import Reporter
    from bd3lm.training.run import run_training, saved_config, train_only
    from bd3lm.training.trainer import Trainer

__all__ = [
    "Callback",
    "Reporter",
    "RunStart",
    "Trainer",
    "holds_run",
    "make_loggers",
    "read_metrics",
    "run_training",
    "saved_config",
    "train_only",
]

__getattr__ = imported_on_use(
    "bd3lm.training",
    {
        "Callback": "callbacks",
        "Reporter": "reporter",
        "RunStart": "callbacks",
        "Trainer": "trainer",
        "holds_run": "directory",
        "make_loggers": "loggers",
        "read_metrics": "metrics",
        "run_training": "run",
        "saved_config": "run",
        "train_only": "run",
    },
)
