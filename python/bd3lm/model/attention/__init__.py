"""One entry point for attention, whatever computes it."""

from __future__ import annotations

from torch import Tensor

from bd3lm.model.attention.dense import dense_attention
from bd3lm.model.attention.mask import BlockMask, Intervals

__all__ = ["BlockMask", "Intervals", "attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention of ``q`` over ``k, v`` under a block-diffusion mask.

    Args:
        q: queries [B, H, Tq, Dh], ``Tq = mask.num_queries``.
        k: keys [B, Hkv, Tk, Dh], ``Tk = mask.num_keys``; H is a multiple of Hkv.
        v: values, shaped as the keys.
        mask: the description of MATH §7 that every backend reads.

    Returns:
        [B, H, Tq, Dh], in the dtype of ``q``.
    """
    return dense_attention(q, k, v, mask)
