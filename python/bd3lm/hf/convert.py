"""Conversion of a checkpoint to a model of the transformers package, in memory."""

from __future__ import annotations

from bd3lm.checkpoint import Checkpoint
from bd3lm.checkpoint.bd3lm_hf import their_config, their_tensors
from bd3lm.hf.configuration_bd3lm import BD3LMConfig
from bd3lm.hf.modeling_bd3lm import BD3LM


def to_transformers(checkpoint: Checkpoint) -> BD3LM:
    """Return the model as :class:`BD3LM`, e.g. for ``push_to_hub``; float32, in evaluation mode.

    Args:
        checkpoint: any checkpoint that ``bd3lm export --layout hf`` writes as a BD3-LM.

    Raises:
        ConfigError: names the setting that the layout cannot hold.
    """
    model = BD3LM(BD3LMConfig(**their_config(checkpoint)))
    model.load_state_dict(their_tensors(checkpoint))
    return model.eval()
