"""Embeddings of the tokens before a position, added to its own (docs/math.md §5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3lm.model.attention import BlockMask

NOTHING = -1
"""Stands for the id of a token that is not there: before the text or in another document."""


class PreviousTokens(nn.Module):
    """Adds embeddings of the tokens before, weighted by feature.

    Attributes:
        weight: of the token 1, 2, … N positions before, [N, D]; zero at first.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))

    def forward(self, h: Tensor, embed: nn.Module, before: Tensor) -> Tensor:
        """Add to the embeddings ``h`` [..., D] those of ``before`` [..., N], the nearest first."""
        for ids, weight in zip(before.unbind(-1), self.weight, strict=True):
            there = (ids != NOTHING).unsqueeze(-1)
            h = h + embed(ids.clamp(min=0)) * weight * there
        return h


def tokens_before(
    ids: Tensor,
    count: int,
    doc_ids: Tensor | None = None,
    *,
    clean: Tensor | None = None,
    block_size: int = 0,
) -> Tensor:
    """Ids before each position, the nearest first, int64 [B, L, N].

    Args:
        ids: [B, L].
        count: N.
        doc_ids: int32 [B, L]; a token of another document is not there.
        clean: x0 [B, L], which is read where the earlier position is in an earlier block. None:
            ``ids`` is read everywhere.
        block_size: S, with ``clean``.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    found = []
    for distance in range(1, count + 1):
        earlier = _shifted(ids, distance)
        if clean is not None:
            inside = place % block_size >= distance
            earlier = torch.where(inside, earlier, _shifted(clean, distance))
        if doc_ids is not None:
            same = doc_ids == _shifted(doc_ids, distance)
            earlier = torch.where(same, earlier, NOTHING)
        found.append(earlier)
    return torch.stack(found, dim=-1)


def tokens_before_both(xt: Tensor, x0: Tensor, mask: BlockMask, count: int) -> Tensor:
    """Ids before each position of the noised and of the clean stream, [B, L + clean, N].

    Args:
        xt: noised ids [B, L].
        x0: clean ids [B, L].
        mask: of a training step, which may leave out the last clean block.
        count: N.
    """
    noised = tokens_before(xt, count, mask.doc_ids, clean=x0, block_size=mask.block_size)
    clean = tokens_before(x0, count, mask.doc_ids)
    return torch.cat([noised, clean[:, : mask.clean_len]], dim=1)


def _shifted(ids: Tensor, distance: int) -> Tensor:
    return F.pad(ids, (distance, 0), value=NOTHING)[:, : ids.shape[1]]
