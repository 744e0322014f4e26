"""Classes for the transformers package (the extra ``hf``), registered under its Auto classes.

After ``import bd3lm.hf``, ``AutoModelForMaskedLM.from_pretrained`` loads BD3-LMs and
``AutoModelForCausalLM.from_pretrained`` loads SDAR models, without remote code.
"""

from __future__ import annotations

from transformers import (  # pyright: ignore[reportMissingImports]
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)

from bd3lm.hf.block_generation import BlockDiffusionGeneration, BlockDiffusionOutput
from bd3lm.hf.configuration_bd3lm import BD3LMConfig
from bd3lm.hf.configuration_sdar import SDARConfig
from bd3lm.hf.convert import to_transformers
from bd3lm.hf.modeling_bd3lm import BD3LM, BD3LMForMaskedLM
from bd3lm.hf.modeling_sdar import SDARForCausalLM, SDARModel

__all__ = [
    "BD3LM",
    "BD3LMConfig",
    "BD3LMForMaskedLM",
    "BlockDiffusionGeneration",
    "BlockDiffusionOutput",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARModel",
    "to_transformers",
]

AutoConfig.register("bd3lm", BD3LMConfig, exist_ok=True)
AutoConfig.register("sdar", SDARConfig, exist_ok=True)
AutoModelForMaskedLM.register(BD3LMConfig, BD3LM, exist_ok=True)
AutoModel.register(SDARConfig, SDARModel, exist_ok=True)
AutoModelForCausalLM.register(SDARConfig, SDARForCausalLM, exist_ok=True)
# Saved models carry these sources, so that they also load where bd3lm is not installed.
BD3LMConfig.register_for_auto_class()
SDARConfig.register_for_auto_class()
BD3LM.register_for_auto_class("AutoModelForMaskedLM")
SDARModel.register_for_auto_class("AutoModel")
SDARForCausalLM.register_for_auto_class("AutoModelForCausalLM")
