"""Several noised views of a row: masks, and their complements."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bd3lm.data import Batch


def with_complements(batch: Batch, weights: Tensor, mask_id: int) -> Batch:
    """Add to each view of a row the one in which the other tokens are masked.

    Args:
        batch: B rows with P views each.
        weights: by noisable and masked tokens of a block, float32 [S+1, S+1]
            (:meth:`bd3lm.data.NoiseSpec.complementary_weights`).
        mask_id: of the mask token.

    Returns:
        The rows with 2P views, the complements last. Every noisable token is masked P times, and
        the weights average over the P pairs.
    """
    size, tokens = batch.block_size, batch.xt.numel()
    pairs = len(batch.xt) // len(batch.x0)
    noisable = batch.noisable.repeat(pairs, 1)
    other = noisable.flatten().index_fill(0, batch.masked, False)
    number = pairs * batch.num_noisable - len(batch.masked)
    masked = torch.nonzero_static(other, size=number).flatten()
    left = other.view(-1, size).sum(1)
    count = noisable.view(-1, size).sum(1)
    own, complement = weights[count, count - left], weights[count, left]
    hidden = other.view_as(batch.xt)
    weight = [
        own[batch.masked.div(size, rounding_mode="floor")],
        complement[masked.div(size, rounding_mode="floor")],
    ]
    return replace(
        batch,
        xt=torch.cat([batch.xt, torch.where(hidden, mask_id, batch.x0.repeat(pairs, 1))]),
        masked=torch.cat([batch.masked, masked + tokens]),
        weight=torch.cat(weight) / pairs,
        mask_prob=torch.cat([batch.mask_prob, 1 - batch.mask_prob]),
    )
