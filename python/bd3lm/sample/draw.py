"""Exact categorical draws from a whole vocabulary, from one uniform number a row."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row by inverting the cumulative distribution in float64.

    Args:
        logits: [B, V]; -inf is never drawn.
        uniform: float64 [B], in [0, 1).
        temperature: 0 takes the most probable token.
        top_p: nucleus: the smallest set of most probable tokens whose mass reaches ``top_p``;
            the token that crosses it is kept. 1 keeps everything.

    Returns:
        int64 [B].
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    prob = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p >= 1:
        return _invert(prob, uniform)
    prob, order = prob.sort(dim=-1, descending=True)
    before = prob.cumsum(dim=-1) - prob
    kept = prob.masked_fill(before >= top_p, 0.0)
    return order.gather(-1, _invert(kept, uniform)[:, None]).squeeze(1)


def _invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds ``uniform`` times the total."""
    cumulative = mass.cumsum(dim=-1)
    goal = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, goal, right=True).squeeze(1)
    # Rounding can make the goal equal the total: fall back to the last token with mass.
    last = mass.shape[-1] - 1 - (mass > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index, last)
