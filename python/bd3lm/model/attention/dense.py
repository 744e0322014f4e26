"""Dense attention over the materialised mask: the oracle of every other backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3lm.model.attention.mask import BlockMask, CachedMask, RangeMask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Softmax attention under ``mask`` by PyTorch's SDPA, O(Tq·Tk).

    Args:
        q: queries [B, H, Tq, Dh]; any strides.
        k: keys [B, Hkv, Tk, Dh], H a multiple of Hkv.
        v: values, shaped as the keys.
        mask: which keys each query sees.

    Returns:
        [B, H, Tq, Dh]; zero for queries that see nothing (padding).
    """
    allowed = mask.dense(q.device)[:, None]  # [B or 1, 1, Tq, Tk]
    gqa = q.shape[1] != k.shape[1]
    if mask.doc_ids is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=gqa)
    # A row without keys would be NaN: let it see every key, then write zero.
    empty = ~allowed.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | empty, enable_gqa=gqa)
    return out.masked_fill(empty, 0.0)


def dense_ranges(q: Tensor, k: Tensor, v: Tensor, mask: RangeMask) -> Tensor:
    """Run :func:`dense_attention` over any ranges; every query sees a key."""
    allowed = mask.dense(k.shape[2])[:, None]
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=gqa)


def dense_cached(q: Tensor, k: Tensor, v: Tensor, mask: CachedMask) -> Tensor:
    """Run :func:`dense_attention` over a cache [B, Hkv, capacity, Dh] that may be partly filled."""
    key = torch.arange(k.shape[2], dtype=torch.int32, device=k.device)
    allowed = key < mask.end[..., None]  # [B or 1, Tq, capacity]
    # Unwritten entries may be NaN, and 0 * NaN is NaN.
    unused = ~allowed.any(dim=1)[:, None, :, None]
    k, v = k.masked_fill(unused, 0.0), v.masked_fill(unused, 0.0)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], enable_gqa=gqa)
