"""Checkpoints on disk: our own layout, the original implementation's, and transformers'."""

from bd3lm.checkpoint.bd3lm_hf import save_hf
from bd3lm.checkpoint.loading import load_checkpoint
from bd3lm.checkpoint.native import Checkpoint, save_checkpoint
from bd3lm.checkpoint.original import save_original
from bd3lm.checkpoint.sdar import save_sdar

__all__ = [
    "Checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "save_hf",
    "save_original",
    "save_sdar",
]
