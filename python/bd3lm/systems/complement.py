"""Complementary views: a row noised by a mask, and again by the mask's complement."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bd3lm.data import Batch


def with_complement(batch: Batch, weights: Tensor, mask_id: int) -> Batch:
    """Add to each noised row the same row with the other tokens masked.

    Args:
        batch: B rows.
        weights: by noisable and masked tokens of a block, float32 [S+1, S+1]
            (:meth:`bd3lm.data.NoiseSpec.complementary_weights`).
        mask_id: of the mask token.

    Returns:
        2B rows, the complements last. Every noisable token is masked in one of the two, and
        ``num_noisable`` still counts each token once.
    """
    size, tokens = batch.block_size, batch.x0.numel()
    other = batch.noisable.flatten().index_fill(0, batch.masked, False)
    number = batch.num_noisable - len(batch.masked)
    masked = torch.nonzero_static(other, size=number).flatten()
    left = other.view(-1, size).sum(1)
    noisable = batch.noisable.view(-1, size).sum(1)
    own, complement = weights[noisable, noisable - left], weights[noisable, left]
    hidden = other.view_as(batch.x0)
    doc_ids = batch.doc_ids
    return replace(
        batch,
        x0=_twice(batch.x0),
        xt=torch.cat([batch.xt, torch.where(hidden, mask_id, batch.x0)]),
        masked=torch.cat([batch.masked, masked + tokens]),
        weight=torch.cat(
            [
                own[batch.masked.div(size, rounding_mode="floor")],
                complement[masked.div(size, rounding_mode="floor")],
            ]
        ),
        mask_prob=torch.cat([batch.mask_prob, 1 - batch.mask_prob]),
        doc_ids=None if doc_ids is None else _twice(doc_ids),
        noisable=_twice(batch.noisable),
    )


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])
