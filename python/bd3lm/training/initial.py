"""Settings of a run that begins with weights that another program trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.loading import is_foreign
from bd3lm.checkpoint.record import read_json
from bd3lm.config import ModelConfig, TrainConfig, check, from_dict
from bd3lm.files import write_text


def adopt_shape(cfg: TrainConfig, out: Path) -> TrainConfig:
    """Take shape and tokenizer from ``init_from`` if it is of the Llama family or a GGUF file.

    The checkpoint's tokenizer, with ``mask_token`` as its mask, is written to
    ``out/tokenizer.json`` and tokenizes text unless ``tokenizer`` names another. Of ``cfg.model``
    only the choices of :func:`_in_shape_of` are kept. A run that is resumed takes them from its own
    settings.

    Raises:
        ConfigError: ``mask_token`` without such a checkpoint, or one that cannot be the mask.
        CheckpointError: the checkpoint does not load.
    """
    if (out / "config.json").is_file() and (out / "tokenizer.json").is_file():
        return _as_saved(cfg, out)
    if cfg.init_from is None or not is_foreign(cfg.init_from):
        allowed = "None unless init-from is a Llama, SmolLM or Qwen checkpoint"
        check(cfg.mask_token is None, "mask-token", cfg.mask_token, allowed)
        return cfg
    added = cfg.model.previous_tokens
    check(added == 0, "model.previous-tokens", added, "0 with weights of another architecture")
    found = load_checkpoint(cfg.init_from)
    if cfg.mask_token is not None:
        tokenizer = found.tokenizer.with_mask(cfg.mask_token)
        found = load_checkpoint(cfg.init_from, tokenizer=tokenizer)
    file = out / "tokenizer.json"
    write_text(file, found.tokenizer.json)
    return dataclasses.replace(
        cfg,
        tokenizer=str(file) if cfg.tokenizer == "default" else cfg.tokenizer,
        model=_in_shape_of(found.config.model, cfg.model),
        init_unigram=False,
    )


def _in_shape_of(found: ModelConfig, wanted: ModelConfig) -> ModelConfig:
    """A shape with the choices that weights leave open: streams, token shift and dropout."""
    return dataclasses.replace(
        found,
        clean_stream=wanted.clean_stream,
        token_shift=wanted.token_shift,
        dropout=wanted.dropout,
    )


def _as_saved(cfg: TrainConfig, out: Path) -> TrainConfig:
    """Shape and tokenizer of the run in ``out``, which adopted them when it began."""
    saved = from_dict(TrainConfig, read_json(out / "config.json"))
    if saved.init_from != cfg.init_from or saved.mask_token != cfg.mask_token:
        return cfg  # refused with the other settings that must stay
    return dataclasses.replace(
        cfg,
        tokenizer=saved.tokenizer if cfg.tokenizer == "default" else cfg.tokenizer,
        model=_in_shape_of(saved.model, cfg.model),
        init_unigram=False,
    )
