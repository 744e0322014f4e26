"""Export to the SDAR layout, which SGLang, LMDeploy and JetEngine serve.

The tensors are those of Qwen3 (:mod:`bd3lm.checkpoint.llama_family`, which also reads the layout
back). Engines take the argmax over the whole vocabulary, so the rows of the head that were never
trained, the mask's among them, are written such that they do not win it.
"""

from __future__ import annotations

import json
import lzma
import math
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bd3lm.checkpoint.hf_folder import (
    copy_sources,
    mask_at,
    write_card,
    write_tokenizer,
)
from bd3lm.checkpoint.llama_family import to_family
from bd3lm.checkpoint.native import Checkpoint
from bd3lm.checkpoint.tensors import write_tensors
from bd3lm.config import TrainConfig, check
from bd3lm.data import Tokenizer
from bd3lm.files import replaced_directory, write_json
from bd3lm.model import Transformer

ENGINE_MASK = 151_669
"""Id of the mask that SGLang and LMDeploy assume."""
ENGINE_ROWS = 151_936
"""V of the published SDAR models."""
MAX_UNTRAINED = 1e-4
"""Most probability that ids which were never trained may have together."""
DEPTHS = (0.0, 32.0, 64.0, 128.0)
"""Nats by which their logits are lowered; the first that suffices is used."""
ROWS, LENGTH = 16, 256
"""Held-out rows and their length at most."""

Vocab = Literal["engines", "keep"]


def save_sdar(
    path: Path | str,
    checkpoint: Checkpoint,
    *,
    vocab: Vocab = "engines",
    text: list[str] | None = None,
) -> None:
    """Write a block-diffusion model in this layout, float32, with its tokenizer.

    Args:
        path: directory, replaced as a whole.
        checkpoint: a Qwen3-shaped model (preset ``qwen``).
        vocab: ``engines`` moves the mask to id 151,669 and pads to 151,936 rows, as SGLang and
            LMDeploy assume; ``keep`` leaves the ids, for JetEngine and transformers.
        text: documents on which the untrained ids are checked; None: the shipped English text.

    Raises:
        ConfigError: names the first setting that the layout cannot hold and the layout that can;
            or ids that were never trained would be decoded.
    """
    config = checkpoint.config
    _check_representable(config)
    check(vocab in ("engines", "keep"), "vocab", vocab, "engines or keep")
    definition, tokenizer = checkpoint.tokenizer.json, checkpoint.tokenizer
    if vocab == "engines":
        definition, tokenizer = mask_at(tokenizer, ENGINE_MASK)
    elif _named(tokenizer) is None:
        definition, tokenizer = mask_at(tokenizer, tokenizer.mask_id)
    rows = ENGINE_ROWS if vocab == "engines" else checkpoint.model.vocab_size
    rows = max(rows, checkpoint.model.vocab_size)
    tensors = to_family(checkpoint.model.state_dict(), config.model)
    embed, head = _matrices(checkpoint, tokenizer.mask_id, rows, text)
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embed, head
    with replaced_directory(Path(path)) as folder:
        plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        write_tensors(folder / "model.safetensors", plain, {"format": "pt"})
        write_json(folder / "config.json", _their_config(config, tokenizer, rows))
        special = _special(tokenizer)
        write_json(folder / "generation_config.json", special)
        write_tokenizer(folder, definition, tokenizer, config.seq_len)
        sources = ("configuration_sdar.py", "modeling_sdar.py", "block_generation.py")
        copy_sources(folder, *sources)
        launch = (
            "SGLang: `python -m sglang.launch_server --model-path FOLDER --trust-remote-code "
            "--dllm-algorithm LowConfidence --dllm-algorithm-config FILE.yaml`, with "
            f"`block_size: {config.block}` in the file."
        )
        write_card(folder, config, "AutoModelForCausalLM", launch)


# --- settings -----------------------------------------------------------------------------------


def _check_representable(config: TrainConfig) -> None:
    """Refuse settings that the layout cannot hold or engines would decode wrongly."""
    shape = config.model
    told = shape.time_conditioning
    two_streams = config.system == "bd3lm" and config.block < config.seq_len
    needs = "{}: engines would decode it wrongly; --layout {} holds it"
    system_layout = "hf" if config.system in ("ar", "sedd") else "bd3lm"
    for field, value, needed, layout in (
        ("system", config.system, "bd3lm", system_layout),
        ("model.time-conditioning", told, False, "bd3lm" if two_streams else "hf"),
        ("model.cond-width", shape.cond_width, 0, "hf"),
        ("model.clean-stream", shape.clean_stream, "block", "bd3lm"),
        ("model.token-shift", shape.token_shift, False, "bd3lm"),
        ("model.embed-norm", shape.embed_norm, False, "bd3lm"),
        ("model.previous-tokens", shape.previous_tokens, 0, "hf"),
        ("model.softmax-cutoffs", shape.softmax_cutoffs, (), "bd3lm"),
        ("model.qk-norm", shape.qk_norm, True, "hf"),
        ("model.norm", shape.norm, "rmsnorm", "hf"),
        ("model.mlp", shape.mlp, "swiglu", "hf"),
        ("model.mlp-bias", shape.mlp_bias, False, "hf"),
        ("model.head-bias", shape.head_bias, False, "hf"),
        ("model.out-bias", shape.out_bias, shape.qkv_bias, "hf"),
        ("model.rope-scaling.kind", shape.rope_scaling.kind, "none", "hf"),
        ("model.nope-layers", shape.nope_layers, (), "hf"),
    ):
        check(value == needed, field, value, needs.format(needed, layout))


def _their_config(config: TrainConfig, tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """``config.json`` with the keys of the published models."""
    shape = config.model
    return {
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "model_type": "sdar",
        "attention_bias": shape.qkv_bias,
        "attention_dropout": 0.0,
        "block_size": config.block,
        "mask_token_id": tokenizer.mask_id,
        **_special(tokenizer),
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.hidden,
        "max_position_embeddings": config.seq_len,
        "max_window_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.depth,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": rows,
    }


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    eos = tokenizer.eos_id
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": eos}


def _named(tokenizer: Tokenizer) -> str | None:
    """The mask's name in ``tokenizer.json``; None where its id is only behind the last."""
    names = [token for token, i in tokenizer.ids().items() if i == tokenizer.mask_id]
    return names[0] if names else None


# --- rows that were never trained ---------------------------------------------------------------


def _matrices(
    checkpoint: Checkpoint, mask_id: int, rows: int, text: list[str] | None
) -> tuple[Tensor, Tensor]:
    """Embedding and head [rows, D] with the mask at ``mask_id``.

    Raises:
        ConfigError: ids that were never trained would be decoded.
    """
    model, old = checkpoint.model, checkpoint.tokenizer.mask_id
    embed, head = (m.weight.detach().cpu().float() for m in (model.embed, model.head))
    trained = torch.ones(len(head), dtype=torch.bool)
    trained[old] = False
    unused = rows - int(trained.sum())
    fit, held_out = _features(checkpoint, text).chunk(2)
    row = _untrained_row(head[trained], fit, held_out, unused)
    new_embed = embed.mean(0).repeat(rows, 1)
    new_embed[: len(embed)] = embed
    new_embed[mask_id] = embed[old]
    new_head = row.repeat(rows, 1)
    new_head[: len(head)][trained] = head[trained]
    return new_embed, new_head


def _untrained_row(head: Tensor, fit: Tensor, held_out: Tensor, count: int) -> Tensor:
    """A row of the head [D] for ids that must never be decoded.

    The mean of the trained rows cannot win: its logit is the mean of theirs. Where so many
    ids would take too much probability, it is lowered along the mean feature.

    Args:
        head: trained rows [V, D].
        fit: features [M, D] of masked positions, by which it is chosen.
        held_out: features on which it is checked.
        count: ids that get the row.

    Raises:
        ConfigError: no row suffices on ``held_out``.
    """
    mean = fit.mean(0)
    direction = mean / mean.square().sum()
    rows = [head.mean(0) - depth * direction for depth in DEPTHS]
    fits = (row for row in rows if _worst(head, row, fit, count) <= MAX_UNTRAINED)
    row = next(fits, rows[-1])
    worst = _worst(head, row, held_out, count)
    check(
        worst <= MAX_UNTRAINED,
        "probability of ids that were never trained",
        f"{worst:.2g}",
        f"at most {MAX_UNTRAINED:g}, or engines could decode the mask; --layout hf holds it",
    )
    return row


def _worst(head: Tensor, row: Tensor, features: Tensor, count: int) -> float:
    """Largest probability of all untrained ids together; 1 where one of them is the argmax."""
    logits = features @ head.T
    unused = features @ row + math.log(count)
    share = unused - torch.logaddexp(unused, logits.logsumexp(-1))
    wins = features @ row >= logits.amax(-1)
    return float(share.exp().masked_fill(wins, 1.0).amax())


@torch.inference_mode()
def _features(checkpoint: Checkpoint, text: list[str] | None) -> Tensor:
    """Features [M, D] of masked positions of noised rows, about half of all positions."""
    config, tokenizer, model = checkpoint.config, checkpoint.tokenizer, checkpoint.model
    size = config.block
    length = max(size, min(config.seq_len, LENGTH) // size * size)
    ids: list[int] = []
    for document in text if text is not None else _shipped():
        ids += [tokenizer.bos_id, *tokenizer.encode(document)]
        if len(ids) >= ROWS * length:
            break
    check(len(ids) >= 2, "text", f"{len(ids)} tokens", "longer")
    ids = (ids * -(-2 * length // len(ids)))[: max(len(ids) // length, 2) * length]
    device = model.embed.weight.device
    x0 = torch.tensor(ids, device=device).view(-1, length)[:ROWS]
    generator = torch.Generator().manual_seed(1)
    level = torch.rand(len(x0), length // size, generator=generator).repeat_interleave(size, 1)
    masked = torch.rand(x0.shape, generator=generator) < level
    masked[:, 0] = False
    masked[:, -1] = True
    xt = torch.where(masked.to(device), tokenizer.mask_id, x0)
    select = masked.flatten().nonzero()[:, 0].to(device)
    return _denoised(model, xt, x0, size, select).cpu().float()


def _denoised(model: Transformer, xt: Tensor, x0: Tensor, size: int, select: Tensor) -> Tensor:
    if size == x0.shape[1]:
        return model.encode(xt, size, select=select)
    return model.denoise(xt, x0, size, select)


def _shipped() -> list[str]:
    """Some documents of the shipped text."""
    corpus = files("bd3lm").joinpath("assets", "default_corpus.jsonl.xz")
    with corpus.open("rb") as raw, lzma.open(raw, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in islice(lines, 200)]
