"""Rotary parameters in ``config.json`` of the transformers package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bd3lm.config import ModelConfig, RopeScaling
from bd3lm.errors import ConfigError


def read_rope(meta: Mapping[str, Any], default: float = 10_000.0) -> tuple[float, RopeScaling]:
    """Base and scaling, as transformers 5 writes them (``rope_parameters``) or as 4 did.

    Args:
        meta: content of ``config.json``.
        default: base where none is given.

    Raises:
        ConfigError: a scaling that the Transformer does not have.
        KeyError: a parameter that the scaling needs.
    """
    given = {"rope_theta": meta.get("rope_theta"), **(meta.get("rope_scaling") or {})}
    given |= meta.get("rope_parameters") or {}
    theta = float(given["rope_theta"] or default)
    kind = given.get("rope_type") or given.get("type") or "default"
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        share = given["partial_rotary_factor"]
        raise ConfigError("partial_rotary_factor", share, "1: whole heads are rotated")
    if kind == "default":
        return theta, RopeScaling()
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError("rope_type", kind, "default, linear, llama3 or yarn")
    length = None
    if kind != "linear":
        length = given.get("original_max_position_embeddings")
        length = int(length or meta["max_position_embeddings"])
    factor = given.get("factor") or int(meta["max_position_embeddings"]) / (length or 1)
    scaling = RopeScaling(kind=kind, factor=float(factor), original_length=length)
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        scaling = replace(scaling, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        if given.get("mscale") and given.get("mscale_all_dim"):
            raise ConfigError("mscale_all_dim", given["mscale_all_dim"], "left out")
        attention = given.get("attention_factor")
        scaling = replace(
            scaling,
            beta_fast=float(given.get("beta_fast") or 32),
            beta_slow=float(given.get("beta_slow") or 1),
            attention_factor=None if attention is None else float(attention),
            truncate=bool(given.get("truncate", True)),
        )
    return theta, scaling


def rope_parameters(shape: ModelConfig) -> dict[str, Any]:
    """Base and scaling as transformers 5 writes them; the inverse of :func:`read_rope`."""
    scaling = shape.rope_scaling
    if scaling.kind == "none":
        return {"rope_type": "default", "rope_theta": shape.rope_theta}
    out = {"rope_type": scaling.kind, "rope_theta": shape.rope_theta, "factor": scaling.factor}
    if scaling.kind == "linear":
        return out
    out["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
    else:
        names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
    found = {name: getattr(scaling, name) for name in names}
    return out | {name: value for name, value in found.items() if value is not None}
