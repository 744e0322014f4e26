"""Presets: whole runs under a name."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bd3lm.config.check import check
from bd3lm.config.evaluate import EvalConfig
from bd3lm.config.model import ModelConfig
from bd3lm.config.names import SystemName
from bd3lm.config.noise import NoiseConfig
from bd3lm.config.objective import ObjectiveConfig
from bd3lm.config.optim import OptimConfig
from bd3lm.config.serialize import changed
from bd3lm.config.train import TrainConfig


def _paper(system: SystemName, width: int, depth: int, heads: int, cond_width: int) -> TrainConfig:
    """The paper's shapes and recipe (3e-4, 2,500-step warm-up, EMA 0.9999); AR has no adaLN."""
    cond_width = 0 if system == "ar" else cond_width
    return TrainConfig(
        system=system,
        model=ModelConfig(
            width=width,
            depth=depth,
            heads=heads,
            cond_width=cond_width,
            time_conditioning=system == "sedd",
            dropout=0.1,
        ),
        noise=NoiseConfig() if system == "ar" else NoiseConfig(estimator="bernoulli"),
        optim=OptimConfig(),
    )


def tiny(system: SystemName = "bd3lm") -> TrainConfig:
    """The paper's tiny DiT (width 256, depth 8) with the paper's recipe."""
    return _paper(system, 256, 8, 8, 64)


def small(system: SystemName = "bd3lm") -> TrainConfig:
    """The paper's small DiT (width 768, depth 12) with the paper's recipe."""
    return _paper(system, 768, 12, 12, 128)


def medium(system: SystemName = "bd3lm") -> TrainConfig:
    """The paper's medium DiT (width 1024, depth 24) with the paper's recipe."""
    return _paper(system, 1024, 24, 16, 128)


def demo(system: SystemName = "bd3lm") -> TrainConfig:
    """Minutes on two cores: a small model, Muon, the low-variance `count` estimator.

    docs/recipe.md has the measurements behind the steps, the head and the embeddings.
    """
    return TrainConfig(
        system=system,
        steps=700,
        batch_size=32,
        init_unigram=True,
        checkpoint_every=175,
        log_every=10,
        model=ModelConfig(
            width=192,
            depth=3,
            heads=3,
            mlp="relu2",
            qk_norm=True,
            mlp_bias=False,
            tied_embeddings=True,
            embed_norm=True,
            softmax_cutoffs=() if system == "sedd" else (1024, 3072, 8192),
            cond_width=64 if system == "sedd" else 0,
            time_conditioning=system == "sedd",
        ),
        optim=OptimConfig(
            optimizer="muon",
            lr=0.01,
            matrix_lr=0.02,
            betas=(0.9, 0.95),
            momentum=0.9,
            warmup_steps=40,
            decay_fraction=0.6,
            ema_decay=0.98,
        ),
        eval=EvalConfig(every=175),
    )


def joint(system: SystemName = "bd3lm") -> TrainConfig:
    """The demo with a causal clean stream and a next-token loss, the best recipe yet.

    One checkpoint is a block-diffusion and an autoregressive model (docs/recipe.md).
    """
    base = demo(system)
    if system != "bd3lm":
        return base
    return replace(
        base,
        steps=560,
        checkpoint_every=140,
        eval=EvalConfig(every=140),
        model=replace(base.model, clean_stream="causal"),
        objective=ObjectiveConfig(ar_weight=1.0),
    )


def qwen(system: SystemName = "bd3lm") -> TrainConfig:
    """A small model of Qwen3's shape, which `export --layout sdar` writes; demo's recipe."""
    base = demo(system)
    shape = ModelConfig(
        width=192,
        depth=3,
        heads=4,
        kv_heads=2,
        head_dim=64,
        mlp="swiglu",
        mlp_width=512,
        norm="rmsnorm",
        norm_eps=1e-6,
        qk_norm=True,
        mlp_bias=False,
        head_bias=False,
        tied_embeddings=True,
        cond_width=base.model.cond_width,
        time_conditioning=base.model.time_conditioning,
    )
    return replace(base, steps=500, init_unigram=False, model=shape)


PRESETS: dict[str, Callable[[SystemName], TrainConfig]] = {
    "demo": demo,
    "joint": joint,
    "tiny": tiny,
    "small": small,
    "medium": medium,
    "qwen": qwen,
}


def preset(name: str, system: str = "bd3lm", **settings: Any) -> TrainConfig:
    """Return the preset of that name, with some settings changed.

    Examples:
        >>> preset("demo", steps=20, noise={"schedule": "cosine"}).noise.schedule
        'cosine'

    Args:
        name: one of :data:`PRESETS`.
        system: ``bd3lm``, ``mdlm``, ``sedd`` or ``ar``.
        settings: fields of :class:`TrainConfig`; a mapping changes fields of a nested part.

    Raises:
        ConfigError: there is no such preset, system or setting, or a value is out of range.
    """
    check(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    systems = typing.get_args(SystemName)
    check(system in systems, "system", system, f"one of {', '.join(systems)}")
    return changed(PRESETS[name](typing.cast("SystemName", system)), settings)
