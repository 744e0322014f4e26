"""Exact categorical draws from a whole vocabulary, from one uniform number a draw."""

from __future__ import annotations

import torch
from torch import Tensor

from bd3lm.config import SampleConfig

HEAD = 512
"""Most probable tokens that are looked at first: a nucleus is seldom larger."""


def draw(logits: Tensor, uniform: Tensor, cfg: SampleConfig) -> Tensor:
    """One token a row by inverting the cumulative distribution in float64.

    Temperature, then the ``top_k`` most probable tokens, then the nucleus: the smallest set of
    most probable tokens whose mass reaches ``top_p``; the token that crosses it is kept.

    Args:
        logits: [R, V]; -inf is never drawn.
        uniform: float64 [R], in [0, 1).
        cfg: temperature (0 takes the most probable token), top_p and top_k.

    Returns:
        int64 [R].
    """
    if cfg.temperature == 0:
        return logits.argmax(dim=-1)
    prob = torch.softmax(logits.double() / cfg.temperature, dim=-1)
    if cfg.top_p >= 1 and cfg.top_k is None:
        return _invert(prob, uniform)
    vocab = prob.shape[-1]
    if cfg.top_k is not None:
        top, order = prob.topk(min(cfg.top_k, vocab), dim=-1)
        goal = cfg.top_p * top.sum(-1, keepdim=True)
    else:
        top, order = prob.topk(min(HEAD, vocab), dim=-1)
        goal = torch.full_like(uniform, cfg.top_p)[:, None]
        if not bool((top.sum(-1, keepdim=True) >= goal).all()):
            top, order = prob.topk(vocab, dim=-1)
    before = top.cumsum(dim=-1) - top
    kept = top.masked_fill(before >= goal, 0.0)
    return order.gather(-1, _invert(kept, uniform)[:, None]).squeeze(1)


def _invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds ``uniform`` times the total."""
    cumulative = mass.cumsum(dim=-1)
    goal = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, goal, right=True).squeeze(1)
    # Rounding can make the goal equal the total: fall back to the last token with mass.
    last = mass.shape[-1] - 1 - (mass > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index, last)


def discourage(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty: divides the positive logits of seen tokens, multiplies the others.

    Args:
        logits: [R, V].
        seen: bool [R, V].
        penalty: 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
