"""Checkpoints on disk: our own layout, and the original implementation's."""

from bd3lm.checkpoint.loading import load_checkpoint
from bd3lm.checkpoint.native import Checkpoint, save_checkpoint
from bd3lm.checkpoint.original import save_original

__all__ = [
    "Checkpoint",
    "checkpoint_settings",
    "load_checkpoint",
    "save_checkpoint",
    "save_original",
]
