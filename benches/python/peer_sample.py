"""The original implementation's sampler on the CPU: a child of sampling.py.

Its code and settings are imported from the folder that ``BD3LM_PEER`` names and run by the
interpreter that ``BD3LM_PEER_PYTHON`` names: first hitting, key/value cache, nucleus 0.9, one row.

Reads a line for each row to draw; prints seconds and forwards as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from types import MethodType, SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, os.environ["BD3LM_PEER"])


def peer(length: int, block: int, vocab: int):
    """The original's model with random weights everywhere."""
    import hydra
    import main  # noqa: F401 registers the resolvers of its settings
    import transformers
    from diffusion import Diffusion

    tokenizer = SimpleNamespace(
        vocab_size=vocab, bos_token_id=vocab - 1, eos_token_id=vocab - 1, pad_token="[PAD]"
    )
    # Its metrics would download the tokenizer of a judge of samples, which drawing never uses.
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: tokenizer
    settings = [
        "mode=sample_eval",
        "model=tiny",
        "model.attn_backend=sdpa",
        f"model.length={length}",
        f"block_size={block}",
        "loader.batch_size=1",
        "loader.eval_batch_size=1",
        "sampling.first_hitting=true",
        "sampling.kv_cache=true",
        "sampling.nucleus_p=0.9",
    ]
    with hydra.initialize_config_dir(os.path.join(os.environ["BD3LM_PEER"], "configs"), "1.3"):
        config = hydra.compose("config", settings)
    model = Diffusion(config, tokenizer=tokenizer).eval()
    model.backbone.reset_kv_cache = MethodType(_empty_cache, model.backbone)
    with torch.no_grad():
        for weight in model.backbone.parameters():
            if not weight.any():
                weight.normal_(std=0.02)
    return model


def _empty_cache(backbone: Any, **_: object) -> None:
    """Method that replaces the original's, which makes the cache on a GPU."""
    for block in backbone.blocks:
        shape = (1, backbone.max_seqlen, 3 * backbone.config.model.hidden_size)
        block.kv_cache = torch.zeros(shape)
        block.cache_idx = 0


def serve() -> None:
    """Build, then a row a line."""
    parser = argparse.ArgumentParser()
    for name in ("length", "block", "vocab", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    strides = args.length // args.block
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    answer, sys.stdout = sys.stdout, sys.stderr  # its own prints go elsewhere
    model = peer(args.length, args.block, args.vocab)
    forwards = [0]
    model.backbone.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    for _ in sys.stdin:
        forwards[0] = 0
        begun = time.perf_counter()
        with torch.no_grad():
            model._semi_ar_sampler(
                n_samples=1, num_steps=5000, num_strides=strides, seqlen=args.length
            )
        took = time.perf_counter() - begun
        print(json.dumps({"seconds": took, "forwards": forwards[0]}), file=answer, flush=True)


if __name__ == "__main__":
    serve()
