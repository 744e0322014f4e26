"""Checkpoints on disk."""

from bd3lm.checkpoint.native import Checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]
