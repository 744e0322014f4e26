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
    only the choices of :func:`_for_foreign_weights` are kept. A run that is resumed takes them from
    its own settings.

    Raises:
        ConfigError: ``mask_token`` without such a checkpoint, or one that cannot be the mask.
        CheckpointError: the checkpoint does not load.
    """
    if (out / "config.json").is_file():  # what it began with may be gone
        return _as_saved(cfg, out) if (out / "tokenizer.json").is_file() else cfg
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
    return _for_foreign_weights(cfg, found.config.model, str(file))


def _for_foreign_weights(cfg: TrainConfig, shape: ModelConfig, tokenizer: str) -> TrainConfig:
    """Change settings so that weights of another program, of this shape, can begin the run.

    ``cfg`` decides what weights leave open: streams, token shift, dropout, and a tokenizer other
    than the default. Weights that exist need no start from frequencies.
    """
    wanted = cfg.model
    model = dataclasses.replace(
        shape,
        clean_stream=wanted.clean_stream,
        token_shift=wanted.token_shift,
        dropout=wanted.dropout,
    )
    chosen = tokenizer if cfg.tokenizer == "default" else cfg.tokenizer
    return dataclasses.replace(cfg, tokenizer=chosen, model=model, init_unigram=False)


def for_native_weights(cfg: TrainConfig, shape: ModelConfig) -> TrainConfig:
    """Change settings so that weights of ours, of this shape, can begin the run.

    Dropout and time conditioning stay those of ``cfg``: they are no part of the shape. A clean
    stream is causal if that of ``cfg`` or of the weights is. Runs of ar and sedd have no token
    shift, and weights that exist need no start from frequencies.
    """
    causal = cfg.model.causal_clean or shape.causal_clean
    model = dataclasses.replace(
        shape,
        dropout=cfg.model.dropout,
        time_conditioning=cfg.model.time_conditioning and shape.cond_width > 0,
        clean_stream="causal" if causal else "block",
        token_shift=shape.token_shift and cfg.system in ("bd3lm", "mdlm"),
    )
    return dataclasses.replace(cfg, model=model, init_unigram=False)


def _as_saved(cfg: TrainConfig, out: Path) -> TrainConfig:
    """Shape and tokenizer of the run in ``out``, which adopted them when it began."""
    saved = from_dict(TrainConfig, read_json(out / "config.json"))
    if saved.init_from != cfg.init_from or saved.mask_token != cfg.mask_token:
        return cfg  # refused with the other settings that must stay
    return _for_foreign_weights(cfg, saved.model, saved.tokenizer)
