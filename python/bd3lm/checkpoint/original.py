"""The original implementation's checkpoints: its DiT on the Hugging Face hub.

A directory with ``config.json`` and the weights, as ``model.safetensors`` or
``pytorch_model.bin``, in one file or in parts with an index. The shape of the network is the same
as that of :class:`Transformer` with LayerNorm, GELU and adaLN. Only the names differ, so weights
that are loaded and saved again keep their bits.
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
from bd3lm.checkpoint.tensors import check_tensors, fill, skeleton, write_tensors
from bd3lm.checkpoint.weights import read_weights
from bd3lm.config import ModelConfig, NoiseConfig, SystemName, TrainConfig, check
from bd3lm.data import Tokenizer, load_tokenizer
from bd3lm.errors import CheckpointError, ConfigError
from bd3lm.files import replaced_directory, write_json, write_text
from bd3lm.model.rotary import frequencies

TOKENIZER = "gpt2"
"""The published models' tokenizer, by its name on the hub; the mask is id 50257, so V = 50258."""

PARTS = {
    "time.up": "sigma_map.mlp.0",
    "time.down": "sigma_map.mlp.2",
    "previous": "previous",
    "embed_norm": "embed_norm",
    "norm": "output_layer.norm_final",
    "ada": "output_layer.adaLN_modulation",
    "head": "output_layer.linear",
    "clusters": "output_layer.clusters",
}
BLOCK_PARTS = {
    "norm1": "norm1",
    "qkv": "attn_qkv",
    "out": "attn_out",
    "norm2": "norm2",
    "mlp.up": "mlp.0",
    "mlp.down": "mlp.2",
    "ada": "adaLN_modulation",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
}
FREQUENCIES = "backbone.rotary_emb.inv_freq"
CLIP = ("sampling_eps_min", "sampling_eps_max")


def is_original(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is of this layout."""
    return "model_type" in config and "hidden_dim" in config


def their_name(name: str) -> str:
    """The original's name of one of :class:`Transformer`'s parameters.

    Examples:
        >>> their_name("blocks.3.mlp.up.weight")
        'backbone.blocks.3.mlp.0.weight'
    """
    module, _, leaf = name.rpartition(".")
    if module == "embed":
        return "backbone.vocab_embed.embedding"
    if module.startswith("blocks."):
        _, index, part = module.split(".", 2)
        return f"backbone.blocks.{index}.{BLOCK_PARTS[part]}.{leaf}"
    return f"backbone.{PARTS[module]}.{leaf}"


def load_original(
    path: Path, device: torch.device | str = "cpu", tokenizer: Tokenizer | str | None = None
) -> Checkpoint:
    """Load a checkpoint of this layout; no code in its folder is run.

    Args:
        path: its directory.
        device: where the weights go; they become float32.
        tokenizer: the one it was trained with, or its name. None: its ``tokenizer.json``,
            else GPT-2's from the hub.

    Raises:
        CheckpointError: weights that are missing, of another shape or not plain tensors; a
            vocabulary that is not the tokenizer's; a model this Transformer does not describe.
        TokenizerError: the tokenizer does not load.
    """
    meta = read_json(path / "config.json")
    source, tensors = read_weights(path)
    config, vocab_size = _settings(path, meta, tensors)
    text = _tokenizer(path, tokenizer)
    padded = "mask_token_id" in meta and vocab_size > text.vocab_size
    if padded:
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    elif text.vocab_size != vocab_size:
        raise CheckpointError(
            f"{path} has {vocab_size} ids and the tokenizer {text.name} {text.vocab_size}, its "
            "mask token included; name the one that this model was trained with"
        )
    if meta.get("mask_token_id", text.mask_id) != text.mask_id:
        raise CheckpointError(
            f"{path}: its config.json says mask_token_id = {meta['mask_token_id']}, the tokenizer "
            f"{text.name} has the mask at {text.mask_id}"
        )
    if config.model.tied_embeddings and not _shares_head(tensors):  # trained apart since
        config = replace(config, model=replace(config.model, tied_embeddings=False))
    model = skeleton(config.model, vocab_size, tensors, their_name("embed.weight"), source)
    own = model.state_dict()
    stored = stored_frequencies(config.model)
    needed = {their_name(name): tensor for name, tensor in own.items()}
    needed[FREQUENCIES] = stored
    found = {FREQUENCIES: stored} | {k: v for k, v in tensors.items() if k not in CLIP}
    check_tensors(found, needed, source, any_float=True)
    if not torch.allclose(found[FREQUENCIES].float(), stored, rtol=1e-2):  # bf16 will do
        raise CheckpointError(
            f"{source} holds {FREQUENCIES} of another base than {config.model.rope_theta:.0f}"
        )
    model = fill(model, {name: tensors[their_name(name)] for name in own}, device)
    return Checkpoint(config, model.eval(), text, 0, path)


def save_original(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write a model in this layout, with its tokenizer.

    Args:
        path: directory, replaced as a whole.
        checkpoint: any model of the original's kind: LayerNorm, GELU, biases in the MLP and the
            head, no normalised queries and keys, as many key as query heads.

    Raises:
        ConfigError: names the first setting that the layout cannot hold.
    """
    config, model = checkpoint.config, checkpoint.model
    _check_representable(config)
    tensors = {their_name(name): tensor for name, tensor in model.state_dict().items()}
    tensors[FREQUENCIES] = stored_frequencies(config.model)
    clip = config.noise.clip
    if clip is not None:
        tensors |= {name: torch.tensor(bound) for name, bound in zip(CLIP, clip, strict=True)}
    with replaced_directory(Path(path)) as folder:
        plain = {name: t.detach().cpu().clone() for name, t in tensors.items()}
        write_tensors(folder / "model.safetensors", plain, {"format": "pt"})
        write_json(folder / "config.json", original_config(config, model.vocab_size))
        write_text(folder / "tokenizer.json", checkpoint.tokenizer.json)


# --- settings -----------------------------------------------------------------------------------


def _settings(
    path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[TrainConfig, int]:
    """Settings of the model that ``meta`` describes, and V."""
    try:
        told = bool(meta.get("time_conditioning", False))
        conditioned = "backbone.sigma_map.mlp.0.weight" in tensors
        system = _system(path, meta, conditioned=conditioned, told=told)
        model = ModelConfig(
            width=int(meta["hidden_dim"]),
            depth=int(meta["n_blocks"]),
            heads=int(meta["n_heads"]),
            cond_width=int(meta["cond_dim"]) if conditioned else 0,
            time_conditioning=told,
            dropout=float(meta.get("dropout", 0.0)),
            **_extension(meta),
        )
        noise = NoiseConfig()
        if system != "ar":
            noise = NoiseConfig(estimator="bernoulli", clip=_clip(tensors))
        config = TrainConfig(
            system=system,
            seq_len=int(meta["model_length"]),
            block_size=int(meta["block_size"]) if system == "bd3lm" else None,
            tokenizer=TOKENIZER,
            model=model,
            noise=noise,
        )
        return config, int(meta["vocab_size"])
    except KeyError as error:
        raise CheckpointError(f"{path / 'config.json'} does not say {error.args[0]}") from error
    except (ConfigError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def _extension(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the keys that :mod:`bd3lm.checkpoint.bd3lm_hf` adds; defaults without them."""
    theta, scaling = read_rope(meta)
    names = ("head_dim", "mlp", "norm", "norm_eps", "qk_norm", "tied_embeddings", "embed_norm")
    more = ("mlp_bias", "head_bias", "qkv_bias", "out_bias", "previous_tokens")
    found = {name: meta[name] for name in (*names, *more) if name in meta}
    if found.get("head_dim") == int(meta["hidden_dim"]) / int(meta["n_heads"]):
        del found["head_dim"]  # the default
    for ours, theirs in (("kv_heads", "n_kv_heads"), ("mlp_width", "mlp_dim")):
        if theirs in meta:
            found[ours] = meta[theirs]
    for name in ("nope_layers", "softmax_cutoffs"):
        found[name] = tuple(meta.get(name) or ())
    return found | {"rope_theta": theta, "rope_scaling": scaling}


def _system(path: Path, meta: Mapping[str, Any], *, conditioned: bool, told: bool) -> SystemName:
    """System of the model, by its attention and, where that is the same, by convention.

    AR is the only one without adaLN. A time-conditioned model over the whole row is SEDD unless
    ``parameterization`` says otherwise; a time-conditioned MDLM has the same layout.
    """
    if meta.get("causal", not conditioned):
        return "ar"
    if meta.get("cross_attn", meta["model_type"] == "bd3lm"):
        if told and int(meta["block_size"]) < int(meta["model_length"]):
            raise CheckpointError(
                f"{path} tells its clean stream the noise level; here that stream is always clean"
            )
        return "bd3lm"
    parameterization = meta.get("parameterization", "sedd" if told else "subs")
    return "sedd" if parameterization == "sedd" else "mdlm"


def _clip(tensors: Mapping[str, Tensor]) -> tuple[float, float] | None:
    """The levels it was last trained on, which a tuned run keeps among its weights."""
    if not all(name in tensors for name in CLIP):
        return None
    low, high = (float(tensors[name]) for name in CLIP)
    return low, high


def original_config(config: TrainConfig, vocab_size: int) -> dict[str, Any]:
    """``config.json`` of the original for one of our models."""
    shape, clip = config.model, config.noise.clip
    return {
        "model_type": "bd3lm",
        "architectures": ["BD3LM"],
        "parameterization": {"ar": "ar", "sedd": "sedd"}.get(config.system, "subs"),
        "block_size": config.block,
        "vocab_size": vocab_size,
        "model_length": config.seq_len,
        "cross_attn": config.system == "bd3lm",
        "causal": config.system == "ar",
        "adaln": shape.cond_width > 0,
        "attn_backend": "sdpa",
        "hidden_dim": shape.width,
        "cond_dim": shape.cond_width,
        "n_blocks": shape.depth,
        "n_heads": shape.heads,
        "dropout": shape.dropout,
        "time_conditioning": shape.time_conditioning,
        "var_min": clip is not None,
        "return_dict": False,
    }


def _check_representable(config: TrainConfig) -> None:
    """Refuse settings that the layout cannot hold."""
    shape = config.model
    kept = ModelConfig(
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        kv_heads=shape.heads,
        mlp_width=4 * shape.width,
        cond_width=shape.cond_width,
        time_conditioning=shape.time_conditioning,
        dropout=shape.dropout,
        tied_embeddings=shape.tied_embeddings,
    )
    usual = shape.head_width * shape.heads == shape.width
    given = replace(
        shape,
        kv_heads=shape.num_kv_heads,
        mlp_width=shape.hidden,
        head_dim=None if usual else shape.head_dim,
    )
    for name, value in vars(given).items():
        needed = getattr(kept, name)
        allowed = f"{needed}: the original's layout holds nothing else"
        check(value == needed, f"model.{name.replace('_', '-')}", value, allowed)
    check(
        not shape.time_conditioning or config.system != "bd3lm" or config.block == config.seq_len,
        "model.time-conditioning",
        True,
        "False: the original feeds the noise level to its clean stream too, which this model never "
        "saw",
    )


def stored_frequencies(shape: ModelConfig) -> Tensor:
    """The rotary frequencies that the layout stores, float32 [Dh/2]."""
    if shape.rope_scaling.kind == "none":  # to the bit as the original computes them
        even = torch.arange(0, shape.head_width, 2).float()
        return 1.0 / (shape.rope_theta ** (even / shape.head_width))
    return frequencies(shape.head_width, shape.rope_theta, shape.rope_scaling)[0].float()


def _shares_head(tensors: Mapping[str, Tensor]) -> bool:
    embed, head = (tensors.get(their_name(name)) for name in ("embed.weight", "head.weight"))
    return embed is not None and head is not None and torch.equal(embed, head)


def _tokenizer(path: Path, given: Tokenizer | str | None) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    beside = path / "tokenizer.json"
    return load_tokenizer(given or (beside if beside.is_file() else TOKENIZER))
