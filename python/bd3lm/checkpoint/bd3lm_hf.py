"""Export for the transformers package.

An autoregressive model of the Llama family becomes a causal language model of that library. Any
other model becomes a BD3-LM for its Auto classes, in the original's layout with more keys in
``config.json`` so that it holds every shape, and with the sources of :mod:`bd3lm.hf`.
:func:`bd3lm.checkpoint.load_checkpoint` reads both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3lm.checkpoint.hf_folder import copy_sources, write_card, write_tokenizer
from bd3lm.checkpoint.llama_export import family_kind, save_llama_family
from bd3lm.checkpoint.native import Checkpoint
from bd3lm.checkpoint.original import (
    CLIP,
    FREQUENCIES,
    original_config,
    stored_frequencies,
    their_name,
)
from bd3lm.checkpoint.rope import rope_parameters
from bd3lm.checkpoint.tensors import write_tensors
from bd3lm.config import TrainConfig, check
from bd3lm.files import replaced_directory, write_json


def save_hf(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write any model for the transformers package, float32, with its tokenizer.

    Args:
        path: directory, replaced as a whole.
        checkpoint: the model.

    Raises:
        ConfigError: a time-conditioned block-diffusion model.
    """
    if family_kind(checkpoint.config) is not None:
        save_llama_family(path, checkpoint)
        return
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    meta = their_config(checkpoint)
    tensors = {n: t.detach().cpu().clone() for n, t in their_tensors(checkpoint).items()}
    clip = config.noise.clip
    if clip is not None:
        tensors |= {name: torch.tensor(bound) for name, bound in zip(CLIP, clip, strict=True)}
    with replaced_directory(Path(path)) as folder:
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        write_json(folder / "config.json", meta)
        write_tokenizer(folder, tokenizer.json, tokenizer, config.seq_len)
        sources = ("configuration_bd3lm.py", "modeling_bd3lm.py", "block_generation.py")
        copy_sources(folder, *sources)
        write_card(folder, config, "AutoModelForMaskedLM", "`model.generate` decodes blocks.")


def their_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Content of ``config.json``: the original's keys, and those that describe other shapes.

    Raises:
        ConfigError: a time-conditioned block-diffusion model.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    _check_representable(config)
    shape = config.model
    meta = original_config(config, checkpoint.model.vocab_size)
    del meta["return_dict"]
    return meta | {
        "architectures": ["BD3LM"],
        "auto_map": {
            "AutoConfig": "configuration_bd3lm.BD3LMConfig",
            "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
        },
        "n_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_width,
        "mlp": shape.mlp,
        "mlp_dim": shape.hidden,
        "norm": shape.norm,
        "norm_eps": shape.norm_eps,
        "qk_norm": shape.qk_norm,
        "rope_parameters": rope_parameters(shape),
        "nope_layers": list(shape.nope_layers),
        "mlp_bias": shape.mlp_bias,
        "head_bias": shape.head_bias,
        "qkv_bias": shape.qkv_bias,
        "out_bias": shape.out_bias,
        "tied_embeddings": shape.tied_embeddings,
        "embed_norm": shape.embed_norm,
        "softmax_cutoffs": list(checkpoint.model.cutoffs),
        "previous_tokens": shape.previous_tokens,
        "mask_token_id": tokenizer.mask_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }


def their_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors by their names, a tied head under both."""
    tensors = {their_name(n): t for n, t in checkpoint.model.state_dict().items()}
    tensors[FREQUENCIES] = stored_frequencies(checkpoint.config.model)
    return tensors


def _check_representable(config: TrainConfig) -> None:
    told = config.model.time_conditioning
    two_streams = config.system == "bd3lm" and config.block < config.seq_len
    check(
        not (told and two_streams),
        "model.time-conditioning",
        told,
        "False where the clean stream is not told the level; --layout bd3lm holds it",
    )
    check(
        not config.model.token_shift,
        "model.token-shift",
        True,
        "False; --layout bd3lm holds a token-shifted model",
    )
    check(
        not (config.model.causal_clean and two_streams),
        "model.clean-stream",
        config.model.clean_stream,
        "block; --layout bd3lm holds a causal one, and with --as-ar this layout holds the "
        "autoregressive model that it also is",
    )
