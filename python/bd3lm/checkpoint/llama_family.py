"""Checkpoints of the Llama family as ``transformers`` writes them: Llama, SmolLM, Qwen and SDAR.

A folder holds ``config.json``, the weights and ``tokenizer.json``. The network is a
:class:`Transformer` with RMSNorm, SwiGLU and rotary positions; only names and the packing of the
matrices differ. SDAR is Qwen3 trained by block diffusion, the others are autoregressive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3lm.checkpoint.native import Checkpoint
from bd3lm.checkpoint.record import read_json
from bd3lm.checkpoint.rope import read_rope
from bd3lm.checkpoint.tensors import check_tensors, fill, skeleton
from bd3lm.checkpoint.weights import read_weights
from bd3lm.config import ModelConfig, TrainConfig
from bd3lm.data import Tokenizer, load_tokenizer
from bd3lm.errors import CheckpointError, ConfigError

FAMILY = ("llama", "qwen2", "qwen3", "smollm3", "sdar")
"""``model_type`` of the checkpoints that are read."""
WINDOW = 2048
"""Most positions of a row of an imported model; the cache of a sampler has room for a row."""
HEAD_DIM = {"qwen3": 128, "sdar": 128}
"""Head width where ``config.json`` does not say it, unless it is width / heads."""
THETA = {"smollm3": 2_000_000.0}
"""Base of the rotations where ``config.json`` does not say it, unless it is 10,000."""

TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
LAYER = {
    "norm1": ["input_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "q_norm": ["self_attn.q_norm"],
    "k_norm": ["self_attn.k_norm"],
    "out": ["self_attn.o_proj"],
    "norm2": ["post_attention_layernorm"],
    "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
"""Name of a part of a block, and the layout's names of the matrices that it stacks."""


def is_llama_family(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is of this layout."""
    return config.get("model_type") in FAMILY


def load_llama_family(
    path: Path, device: torch.device | str = "cpu", tokenizer: Tokenizer | str | None = None
) -> Checkpoint:
    """Load a checkpoint of this layout; no code in its folder is run.

    Args:
        path: its directory.
        device: where the weights go; they become float32.
        tokenizer: one with the same ids, e.g. with another token as its mask
            (:func:`bd3lm.data.load_tokenizer`). None: its ``tokenizer.json``.

    Raises:
        CheckpointError: weights that are missing or of another shape; a model that this
            Transformer does not describe; a tokenizer with other ids.
        TokenizerError: the tokenizer does not load.
    """
    meta = read_json(path / "config.json")
    source, tensors = read_weights(path)
    own = _tokenizer(path)
    given = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return assemble(path, source, meta, tensors, own, given, device)


def assemble(
    path: Path,
    source: Path,
    meta: Mapping[str, Any],
    tensors: dict[str, Tensor],
    own: Tokenizer,
    given: Tokenizer | None = None,
    device: torch.device | str = "cpu",
) -> Checkpoint:
    """Build the model of a ``config.json`` and its tensors.

    Args:
        path: where the checkpoint is.
        source: file that names the tensors, for messages.
        meta: content of ``config.json``.
        tensors: by their names.
        own: tokenizer of the checkpoint.
        given: one with the same ids to be used instead; or None.
        device: where the weights go.

    Raises:
        CheckpointError: as :func:`load_llama_family`.
    """
    config = settings(path, meta, tied="lm_head.weight" not in tensors)
    tokenizer = own if given is None else _same_ids(path, own, given)
    if config.model.tied_embeddings:
        tensors.pop("lm_head.weight", None)
    tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    embedding = TOP["embed.weight"]
    if embedding not in tensors:
        raise CheckpointError(f"{source} has no tensor {embedding}, which this model needs")
    rows = len(tensors[embedding])
    _check_mask(path, meta, tokenizer, rows)
    empty = skeleton(config.model, rows, tensors, embedding, source)
    needed = to_family(empty.state_dict(), config.model)
    check_tensors(tensors, needed, source, any_float=True)
    state = from_family(tensors, config.model)
    for name in {"embed.weight", "head.weight"} & state.keys():
        state[name] = _with_rows(state[name], tokenizer.vocab_size)
    if config.model.tied_embeddings:
        state["head.weight"] = state["embed.weight"]
    rows = len(state["embed.weight"])
    padded = None if rows == tokenizer.vocab_size else rows
    config = replace(config, model=replace(config.model, vocab_size=padded))
    empty = skeleton(config.model, tokenizer.vocab_size, state, "embed.weight", source)
    return Checkpoint(config, fill(empty, state, device).eval(), tokenizer, 0, path)


# --- settings -----------------------------------------------------------------------------------


def settings(path: Path, meta: Mapping[str, Any], *, tied: bool = True) -> TrainConfig:
    """Settings that describe the model of a ``config.json``.

    Args:
        path: where the checkpoint is; its tokenizer is named in the settings.
        meta: content of ``config.json``.
        tied: whether the head shares the embedding where ``config.json`` does not say it.

    Raises:
        CheckpointError: a key that is missing, or a model that the Transformer does not describe.
    """
    try:
        shape = _shape(meta, tied=tied)
        longest = min(int(meta["max_position_embeddings"]), WINDOW)
        if meta["model_type"] != "sdar":
            return TrainConfig(system="ar", seq_len=longest, tokenizer=str(path), model=shape)
        block = int(meta["block_size"])
        return TrainConfig(
            system="bd3lm",
            block_size=block,
            seq_len=longest // block * block,
            tokenizer=str(path),
            model=shape,
        )
    except KeyError as error:
        raise CheckpointError(f"{path / 'config.json'} does not say {error.args[0]}") from error
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def _shape(meta: Mapping[str, Any], *, tied: bool) -> ModelConfig:
    kind, depth = meta["model_type"], int(meta["num_hidden_layers"])
    _check_supported(meta)
    theta, scaling = read_rope(meta, THETA.get(kind, 10_000.0))
    bias = bool(meta.get("attention_bias", False))
    width, heads = int(meta["hidden_size"]), int(meta["num_attention_heads"])
    head_dim = int(meta.get("head_dim") or HEAD_DIM.get(kind, 0)) or None
    if head_dim is not None and head_dim * heads == width:
        head_dim = None  # the default
    return ModelConfig(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=int(meta.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        mlp="swiglu",
        mlp_width=int(meta["intermediate_size"]),
        norm="rmsnorm",
        norm_eps=float(meta.get("rms_norm_eps", 1e-6)),
        qk_norm=kind in ("qwen3", "sdar"),
        rope_theta=theta,
        rope_scaling=scaling,
        nope_layers=_nope_layers(meta, depth) if kind == "smollm3" else (),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias and kind != "qwen2",
        mlp_bias=bool(meta.get("mlp_bias", False)),
        head_bias=False,
        tied_embeddings=bool(meta.get("tie_word_embeddings", tied)),
    )


def _check_supported(meta: Mapping[str, Any]) -> None:
    """Refuse settings that the Transformer does not compute."""
    act = meta.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ConfigError("hidden_act", act, "silu")
    windows = bool(meta.get("use_sliding_window", False)) and meta.get("sliding_window") is not None
    others = set(meta.get("layer_types") or []) - {"full_attention"}
    if windows or others:
        value = ", ".join(sorted(others)) or "True"
        raise ConfigError("use_sliding_window", value, "False: attention here has no window")


def _nope_layers(meta: Mapping[str, Any], depth: int) -> tuple[int, ...]:
    """Blocks without rotations: those marked 0, or every fourth where none are marked."""
    marks = meta.get("no_rope_layers")
    if marks is None:
        every = int(meta.get("no_rope_layer_interval", 4))
        marks = [int((layer + 1) % every != 0) for layer in range(depth)]
    return tuple(layer for layer in range(depth) if not marks[layer])


# --- tensors ------------------------------------------------------------------------------------


def to_family(state: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Tensors of a :class:`Transformer` under the family's names; a tied head is left out."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in TOP:
            out[TOP[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        part, _, leaf = rest.rpartition(".")
        theirs = LAYER[part]
        for their, piece in zip(theirs, tensor.split(_sizes(part, cfg, tensor)), strict=True):
            out[f"model.layers.{layer}.{their}.{leaf}"] = piece
    if cfg.tied_embeddings:
        out.pop("lm_head.weight", None)
    return out


def from_family(tensors: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Tensors of :class:`Transformer`, float32; the inverse of :func:`to_family`."""
    ours = {their: name for name, their in TOP.items()}
    state = {ours[name]: tensor.float() for name, tensor in tensors.items() if name in ours}
    for layer in range(cfg.depth):
        prefix = f"model.layers.{layer}."
        for part, theirs in LAYER.items():
            for leaf in ("weight", "bias"):
                pieces = [tensors.get(f"{prefix}{their}.{leaf}") for their in theirs]
                if all(piece is not None for piece in pieces):
                    stacked = torch.cat([p.float() for p in pieces if p is not None])
                    state[f"blocks.{layer}.{part}.{leaf}"] = stacked
    return state


def _sizes(part: str, cfg: ModelConfig, tensor: Tensor) -> list[int]:
    """Rows of each of the matrices that a part stacks."""
    if part == "qkv":
        keys = cfg.num_kv_heads * cfg.head_width
        return [cfg.heads * cfg.head_width, keys, keys]
    if part == "mlp.up":
        return [cfg.hidden, cfg.hidden]
    return [len(tensor)]


def _with_rows(matrix: Tensor, rows: int) -> Tensor:
    """A matrix [V, D] with at least ``rows`` rows; new ones are the mean of the others."""
    missing = rows - len(matrix)
    if missing <= 0:
        return matrix
    return torch.cat([matrix, matrix.mean(0, keepdim=True).expand(missing, -1)])


# --- tokenizer ----------------------------------------------------------------------------------


def _tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{path} holds no tokenizer.json")
    return load_tokenizer(file)


def _same_ids(path: Path, own: Tokenizer, given: Tokenizer) -> Tokenizer:
    """The given tokenizer, after a check that its ids are the checkpoint's but for the mask."""
    masks = {given.mask_id, own.mask_id}
    ids = [{token: i for token, i in t.ids().items() if i not in masks} for t in (given, own)]
    if ids[0] != ids[1]:
        raise CheckpointError(
            f"{path} was trained with another tokenizer ({own.name}) than {given.name}"
        )
    return given


def _check_mask(path: Path, meta: Mapping[str, Any], tokenizer: Tokenizer, rows: int) -> None:
    """Check that the mask is the only id which may lack a row, and SDAR's the one it names."""
    ids = tokenizer.vocab_size - (tokenizer.mask_id == tokenizer.vocab_size - 1)
    if ids > rows:
        raise CheckpointError(
            f"{path} has {rows} rows of embeddings and its tokenizer {ids} ids besides the mask"
        )
    named = meta.get("mask_token_id") if meta["model_type"] == "sdar" else None
    if named is not None and named != tokenizer.mask_id:
        raise CheckpointError(
            f"{path}: its config.json says mask_token_id = {named}, its tokenizer {tokenizer.name} "
            f"has the mask at {tokenizer.mask_id}"
        )
