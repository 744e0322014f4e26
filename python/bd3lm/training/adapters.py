"""Low-rank adapters (LoRA) on the frozen weights of a model, by ``peft`` (the extra ``lora``).

peft replaces a linear layer by one that adds the product of two small matrices. A block then takes
the path of layers that are no plain matrix, which computes the same numbers with fewer fused
operations. Checkpoints hold the merged weights, so nothing but the training itself needs peft.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bd3lm.config import LoraConfig
from bd3lm.extras import require
from bd3lm.model import Transformer

NAME = "default"
"""peft's name of the only adapter."""
BASE = "base_layer."
DOWN, UP = f"lora_A.{NAME}.weight", f"lora_B.{NAME}.weight"
"""Matrices [rank, K] and [D, rank] of an adapter, behind the name of their layer."""


def add_adapters(model: Transformer, cfg: LoraConfig) -> None:
    """Freeze a model and give its blocks adapters, whose product is zero at first.

    Args:
        model: changed in place.
        cfg: with a rank above 0.

    Raises:
        MissingPackageError: the extra ``lora`` is not installed.
    """
    peft = require("peft", "lora", "lora.rank")
    names = "|".join(map(re.escape, cfg.targets))
    settings = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        target_modules=rf"blocks\.\d+\.({names})",
        lora_dropout=0.0,
        bias="none",
    )
    peft.inject_adapter_in_model(settings, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((DOWN, UP)))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer updates, by name: all that are not frozen."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model without its adapters, by the names they have in a model without any."""
    return {
        name.replace(BASE, ""): tensor
        for name, tensor in tensors.items()
        if not name.endswith((DOWN, UP))
    }


@torch.no_grad()
def merged_weights(
    model: Transformer, adapters: Mapping[str, Tensor], cfg: LoraConfig
) -> dict[str, Tensor]:
    """The weights of a model without adapters that computes the same.

    Args:
        model: with frozen weights.
        adapters: matrices of its adapters, by name; their average, for example.
        cfg: the scale.
    """
    weights = base_tensors({name: p.detach() for name, p in model.named_parameters()})
    for name, up in adapters.items():
        if not name.endswith(UP):
            continue
        layer = name.removesuffix(UP)
        change = up @ adapters[layer + DOWN]
        weights[f"{layer}weight"] = weights[f"{layer}weight"] + change * (cfg.alpha / cfg.rank)
    return weights
