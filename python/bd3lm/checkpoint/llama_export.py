"""Export of autoregressive models to the causal language models of the transformers package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bd3lm.checkpoint.hf_folder import write_card, write_tokenizer
from bd3lm.checkpoint.llama_family import to_family
from bd3lm.checkpoint.native import Checkpoint
from bd3lm.checkpoint.rope import rope_parameters
from bd3lm.checkpoint.tensors import write_tensors
from bd3lm.config import TrainConfig
from bd3lm.errors import ConfigError
from bd3lm.files import replaced_directory, write_json

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""Class of each ``model_type``."""


def family_kind(config: TrainConfig) -> str | None:
    """``model_type`` of a causal language model that computes the same; None if there is none."""
    shape = config.model
    fits = (
        config.system == "ar"
        and shape.norm == "rmsnorm"
        and shape.mlp == "swiglu"
        and not shape.cond_width
        and not shape.head_bias
        and not shape.softmax_cutoffs
        and not shape.embed_norm
        and not shape.previous_tokens
    )
    if not fits:
        return None
    if shape.qk_norm:
        plain = not shape.nope_layers and not shape.mlp_bias
        return "qwen3" if plain and shape.out_bias == shape.qkv_bias else None
    if shape.qkv_bias and not shape.out_bias:
        return None if shape.nope_layers or shape.mlp_bias else "qwen2"
    if shape.out_bias != shape.qkv_bias:
        return None
    return "smollm3" if shape.nope_layers else "llama"


def save_llama_family(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write an autoregressive model as a causal language model, float32, with its tokenizer.

    The row of a mask that the tokenizer does not name is left out.

    Args:
        path: directory, replaced as a whole.
        checkpoint: a model for which :func:`family_kind` is not None.

    Raises:
        ConfigError: no class of the library computes the same.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    kind = family_kind(config)
    if kind is None:
        raise ConfigError("model", "this shape", "that of a Llama, Qwen2, Qwen3 or SmolLM3")
    tensors = to_family(checkpoint.model.state_dict(), config.model)
    rows = checkpoint.model.vocab_size
    if tokenizer.mask_id == rows - 1 and tokenizer.mask_id not in tokenizer.ids().values():
        rows -= 1
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        tensors[name] = tensors[name][:rows]
    with replaced_directory(Path(path)) as folder:
        plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        write_tensors(folder / "model.safetensors", plain, {"format": "pt"})
        write_json(folder / "config.json", _config(config, kind, rows, tokenizer.special))
        write_tokenizer(folder, tokenizer.json, tokenizer, config.seq_len)
        write_card(folder, config, "AutoModelForCausalLM", "")


def _config(
    config: TrainConfig, kind: str, rows: int, special: tuple[int, int, int, int]
) -> dict[str, Any]:
    """``config.json`` that transformers 4.57 and 5 read."""
    shape = config.model
    rope = rope_parameters(shape)
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    meta: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": rows,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": shape.tied_embeddings,
        "bos_token_id": special[1],
        "eos_token_id": special[2],
        "pad_token_id": special[2],
        "torch_dtype": "float32",
    }
    if shape.rope_scaling.kind != "none":
        meta["rope_scaling"] = scaling
    if kind != "qwen2":
        meta["attention_bias"] = shape.qkv_bias
    if kind in ("llama", "smollm3"):
        meta["mlp_bias"] = shape.mlp_bias
    if kind == "smollm3":
        layers = range(shape.depth)
        meta["no_rope_layers"] = [int(layer not in shape.nope_layers) for layer in layers]
    return meta
