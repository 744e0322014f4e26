"""The mask as the kernels read it: the keys of every query, and the queries of every key."""

from __future__ import annotations

import torch
from torch import Tensor

from bd3lm.model.attention.mask import BlockMask, Intervals, document_bounds
from bd3lm.model.attention.mask_cache import cached_per_mask


@cached_per_mask
def ranges(mask: BlockMask, device: str) -> tuple[Tensor, Tensor]:
    """Both directions of a mask.

    Returns:
        int32 [B or 1, 4, Tq] and [B or 1, 4, Tk], the rows being clean lo, clean hi, noised lo
        and noised hi: the keys of every query, and the queries of every key.
    """
    keys = torch.stack(mask.intervals(device), dim=1)
    return keys, torch.stack(queries_of_keys(mask, device), dim=1)


def queries_of_keys(mask: BlockMask, device: str) -> Intervals:
    """The transposed mask: which queries of either stream see a key; int32 [B or 1, Tk].

    A clean key is seen by the noised queries of the later blocks of its document. Of the clean
    queries, those from its own block on see it, or where they attend causally, those from its own
    position on. A noised key is seen by the noised queries of its block (docs/math.md §7).
    """
    position = torch.arange(mask.seq_len, dtype=torch.int32, device=device)[None]
    start = position // mask.block_size * mask.block_size
    end = (start + mask.block_size).clamp(max=mask.seq_len)
    if mask.doc_ids is None:
        doc_start, doc_end = torch.zeros_like(position), torch.full_like(position, mask.seq_len)
        live = torch.ones_like(position)
    else:
        doc_ids = mask.doc_ids.to(device)
        doc_start, doc_end = document_bounds(doc_ids, position)
        live = (doc_ids >= 0).int()
    own_lo = torch.maximum(start, doc_start)
    own_hi = torch.minimum(end, doc_end)
    nobody = torch.zeros_like(own_lo)

    clean = [nobody] * 4
    if mask.clean_queries:
        causal = position < mask.causal_end
        lo = torch.where(causal, position, own_lo.clamp(min=mask.causal_end))
        clean[0] = (lo - mask.first).clamp(min=0)
        clean[1] = (doc_end - mask.first).clamp(min=0)
    if not mask.noised:
        return Intervals(*(column * live for column in clean))
    clean[2:] = [own_hi, doc_end]
    noised = [nobody, nobody, own_lo, own_hi]
    return Intervals(
        *(torch.cat([n * live, c * live], dim=1) for n, c in zip(noised, clean, strict=True))
    )
