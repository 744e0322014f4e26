"""The ``flash-attn`` package (extra ``gpu``), where a mask is one that it knows: causal or full."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from bd3lm.extras import install_hint
from bd3lm.model.attention.dynamo import fixed_while_compiling
from bd3lm.model.attention.mask import BlockMask, before_last

NEEDS = f"needs an NVIDIA GPU and the flash-attn package: {install_hint('gpu')}"
LIMITS = (
    "takes fp16 or bf16, heads of up to 256 features, no documents, and S = 1, S = L or decoding"
)


@fixed_while_compiling
def available() -> bool:
    """Return whether there is a GPU and the package is installed; the package is not imported."""
    return torch.cuda.is_available() and find_spec("flash_attn") is not None


def is_causal(mask: BlockMask) -> bool | None:
    """True: causal, aligned to the last key. False: every query sees all keys of its stream.

    None: neither, or documents, which take another entry point of the package.
    """
    if mask.doc_ids is not None or mask.clean_queries == mask.noised:
        # Only one stream may have queries; of two, xt can be alone with itself (below).
        return None
    last_block = before_last(mask.seq_len, mask.block_size)
    if mask.noised:
        return False if last_block == 0 else None
    if mask.causal_end >= mask.seq_len:
        return True
    if mask.causal_end > mask.first:
        return None
    if mask.first >= last_block:
        return False
    return True if mask.block_size == 1 else None


def supports(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> bool:
    """Return whether the package takes these inputs."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] <= 256
        and is_causal(mask) is not None
    )


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention under ``mask``; see :func:`bd3lm.model.attention.attend`."""
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    # With S = L an xt query sees xt alone: its block has no clean block before it.
    keys, values = (x[:, :, : mask.seq_len].transpose(1, 2) for x in (k, v))
    out = flash_attn_func(q.transpose(1, 2), keys, values, causal=bool(is_causal(mask)))
    return out.transpose(1, 2)
