"""Write ``tests/golden/llama_family.npz``: logits of transformers on random models.

Run with transformers 5 first, then with 4.57, which adds its own spelling of some configurations:
``python -m tests.extras.make_llama_family``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from tests.checkpoints import weight
from tests.unit.test_llama_family import GOLDEN, IDS, VOCAB

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "qwen3": Qwen3Config(**BASE, head_dim=12, rope_theta=1e6),
    "qwen3_tied_bias": Qwen3Config(
        **BASE, head_dim=8, attention_bias=True, tie_word_embeddings=True
    ),
    "qwen3_yarn": Qwen3Config(**BASE, head_dim=12, rope_theta=1e5, rope_scaling=YARN),
    "llama": LlamaConfig(**BASE),
    "llama3": LlamaConfig(
        **BASE, attention_bias=True, mlp_bias=True, rope_theta=5e5, rope_scaling=LLAMA3
    ),
    "llama_linear": LlamaConfig(**BASE, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "qwen2": Qwen2Config(**BASE),
    "smollm2": LlamaConfig(**BASE, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "smollm3": SmolLM3Config(**BASE | {"num_hidden_layers": 4}),
}


def logits(config: object) -> tuple[np.ndarray, str, str]:
    """Logits [T, V], ``config.json`` and the shapes of the stored tensors."""
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape)))
        out = model(IDS[None]).logits[0].numpy()
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        text = (Path(folder) / "config.json").read_text(encoding="utf-8")
    return out, json.dumps(json.loads(text)), json.dumps(shapes)


def main() -> None:
    """Add the cases of this version to the file."""
    kept = dict(np.load(GOLDEN)) if GOLDEN.exists() else {}
    old = transformers.__version__.startswith("4.")
    for name, config in CASES.items():
        if old and name not in ("qwen3", "llama3", "qwen3_yarn", "smollm2", "smollm3"):
            continue
        key = f"{name}_v4" if old else name
        kept[key], kept[f"{key}.config"], kept[f"{key}.shapes"] = logits(config)
    np.savez_compressed(GOLDEN, **kept)


if __name__ == "__main__":
    main()
