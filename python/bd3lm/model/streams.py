"""Noised and clean streams of one training step.

Shapes: B rows, L sequence, S block, K = L / S blocks, D width, M and N selected positions.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bd3lm.model.attention import BlockMask
from bd3lm.model.previous import tokens_before, tokens_before_both

if TYPE_CHECKING:
    from bd3lm.model.transformer import Transformer


def noised_rows(select: Tensor, mask: BlockMask, *, shifted: bool) -> Tensor:
    """Rows of both streams whose features predict noised positions.

    The rows of a sequence are those of its noised stream, then those of its clean one.
    """
    seq_len = mask.seq_len
    rows = select + select.div(seq_len, rounding_mode="floor") * mask.clean_len
    if not shifted:
        return rows
    first = select % seq_len % mask.block_size == 0
    return rows - 1 + first * seq_len


def at_starts(features: Tensor, before: Tensor, select: Tensor, block_size: int) -> Tensor:
    """Features [M, D] of shifted positions: at the start of a block those of the clean one before.

    Args:
        features: of the position before each selected one, in its own stream.
        before: of the clean position before each block [B*K, D].
        select: flat indices b*L+i [M].
        block_size: S, dividing L.
    """
    first = select % block_size == 0
    of_block = before[select.div(block_size, rounding_mode="floor")].to(features.dtype)
    return torch.where(first[:, None], of_block, features)


def two_streams(
    model: Transformer,
    xt: Tensor,
    x0: Tensor,
    mask: BlockMask,
    sigma: Tensor | None,
    select: Tensor,
    queries: int | None = None,
) -> Tensor:
    """Run the noised stream and the clean one as one sequence of up to 2L rows.

    Args:
        model: its weights.
        xt: noised ids [B, L].
        x0: clean ids [B, L].
        mask: of both streams.
        sigma: [B, K], for time-conditioned models.
        select: flat indices into the rows of both [M].
        queries: rows of each sequence that the last layer computes, the first ones; None: all.

    Returns:
        Normalised features [M, D].
    """
    seq_len, clean = x0.shape[1], x0
    x0 = x0[:, : mask.clean_len]
    cos, sin = model.rotary.table(seq_len, x0.device)
    rope = (torch.cat([cos, cos[: mask.clean_len]]), torch.cat([sin, sin[: mask.clean_len]]))
    cond = model.condition(sigma, mask.block_size, clean=mask.clean_len)
    h = model.embedded(torch.cat([xt, x0], dim=1), partial(tokens_before_both, xt, clean, mask))
    for block in model.blocks[:-1]:
        h = model.run_block(block, h, mask, rope, cond)
    if queries is not None:
        mask = dataclasses.replace(mask, clean_queries=False)
    h = model.run_block(model.blocks[-1], h, mask, rope, cond, queries=queries, select=select)
    return model.normalised(h, cond, queries, select)


def several_views(
    model: Transformer,
    xt: Tensor,
    x0: Tensor,
    mask: BlockMask,
    sigma: Tensor | None,
    select: Tensor,
    predict: Tensor | None = None,
) -> Tensor:
    """Run the clean stream once, and over its keys and values several noised ones.

    Args:
        model: its weights.
        xt: noised ids [n·B, L], n views of the rows one after the other.
        x0: clean ids [B, L].
        mask: of one noised stream and the clean one.
        sigma: [n·B, K], for time-conditioned models.
        select: flat indices b*L+i into ``xt`` [M].
        predict: flat indices b*L+i into ``x0`` [N]; None: none.

    Returns:
        Normalised features [M + N, D], those of noised positions first.
    """
    views, more = divmod(len(xt), len(x0))
    if more:
        raise ValueError(f"xt has {len(xt)} rows: must be a multiple of the {len(x0)} of x0")
    noised_mask, clean_mask = mask.apart(views)
    angles = model.rotary.table(mask.seq_len, x0.device)
    cond = model.condition(sigma, mask.block_size)
    clean_cond = model.condition(None, mask.block_size)
    docs, size, end = mask.doc_ids, mask.block_size, mask.clean_len
    h = model.embedded(
        xt,
        lambda count: tokens_before(
            xt, count, noised_mask.doc_ids, clean=x0.repeat(views, 1), block_size=size
        ),
    )
    clean = model.embedded(x0[:, :end], lambda count: tokens_before(x0, count, docs)[:, :end])
    rows, read = select, predict
    shifted = model.cfg.token_shift
    starts = shifted and end > 0  # with one block there is no clean position before any
    if shifted:
        rows = (select - 1).clamp(min=0)
    if starts:
        row = torch.arange(0, len(x0) * end, end, device=x0.device)[:, None]
        ends = torch.arange(-1, mask.seq_len - 1, size, device=x0.device).clamp(min=0)
        read = (row + ends).flatten()  # the clean position before each block
        read = read if predict is None else torch.cat([read, predict])
    for block in model.blocks:
        last = block is model.blocks[-1]
        clean, *shared = model.run_block(
            block,
            clean,
            clean_mask,
            (angles[0][:end], angles[1][:end]),
            clean_cond,
            shares=True,
            queries=0 if last and read is None else None,
            select=read if last else None,
        )
        past = tuple(x.repeat(views, 1, 1, 1) for x in shared)
        h = model.run_block(
            block, h, noised_mask, angles, cond, past=past, select=rows if last else None
        )
    features = model.normalised(h, cond, None, rows)
    if read is None:
        return features
    of_clean = model.normalised(clean, clean_cond, None, read)
    if starts:
        blocks = x0.numel() // size
        before, of_clean = of_clean[:blocks], of_clean[blocks:]
        features = at_starts(features, before.repeat(views, 1), select, size)
    return torch.cat([features, of_clean])
