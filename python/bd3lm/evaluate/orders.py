"""Exact likelihoods of orders of revealing (docs/math.md §9): the chain rule inside each block.

A sampler that reveals a block's positions one by one, in an order σ, gives the block the
probability Π p(x_σ(j) | tokens already revealed, earlier blocks). The j-th forward scores the j-th
revealed position of every block of every row, so an order takes S forwards.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.device import uploaded
from bd3lm.evaluate.row_scorer import RowScorer


def left_to_right(scorer: RowScorer) -> tuple[Tensor, Tensor]:
    """-log p of each token when blocks are filled from left to right.

    Returns:
        ``(nats, correct)`` on the device: float64 [B, L], and bool [B]: whether greedy decoding in
        this order gives every token of the row (True where the scorer does not read that).
    """
    falling = -torch.arange(scorer.x0.shape[1], dtype=torch.float64)
    return by_level(scorer, falling.expand(scorer.x0.shape))


def by_level(
    scorer: RowScorer, level: Tensor, *, time_conditioned: bool = False
) -> tuple[Tensor, Tensor]:
    """-log p of each token when blocks are filled from the highest level down.

    Args:
        scorer: of the rows.
        level: of every position [B, L].
        time_conditioned: levels are noise levels in (0, 1), and the model gets the level of the
            position that it predicts, as in first hitting (docs/math.md §8).

    Returns:
        As :func:`left_to_right`.
    """
    nats, correct = _nothing(scorer)
    hidden = scorer.noisable.clone()
    while hidden.any():
        at, top = _highest(level, hidden, scorer.block_size)
        found = scorer(hidden, top.float() if time_conditioned else None, at)
        nats += found.nats
        if found.correct is not None:
            correct &= found.correct.all(1)
        hidden &= ~at
    return nats, correct


def by_confidence(scorer: RowScorer) -> tuple[Tensor, Tensor]:
    """-log p of each token when the model's surest position of each block comes next.

    The order depends on revealed tokens and the model's distributions, never on the true token, so
    this is the exact likelihood of a sampler. Of equally sure positions the first comes next.

    Args:
        scorer: made with ``whole_distribution``.

    Returns:
        As :func:`left_to_right`.
    """
    nats, correct = _nothing(scorer)
    hidden = uploaded(scorer.noisable, scorer.x0.device).clone()
    # Each forward reveals a position of every block that has one, so the host knows their number.
    blocks = scorer.noisable.view(-1, scorer.block_size).sum(1)
    for forward in range(int(blocks.max())):
        found = scorer(hidden, count=int((blocks - forward).clamp(min=0).sum()))
        assert found.confidence is not None
        assert found.correct is not None
        at, _ = _highest(found.confidence, hidden, scorer.block_size)
        nats += torch.where(at, found.nats, 0.0)
        correct &= (found.correct | ~at).all(1)
        hidden &= ~at
    return nats, correct


def random_levels(seed: int, repeat: int, keys: NDArray[np.uint64], seq_len: int) -> Tensor:
    """Independent levels of every position, uniform on (0, 1): a random order of every block.

    Returns:
        float64 [B, L], a function of (seed, repeat, key of the row).
    """
    draws = []
    for key in keys.tolist():
        bits = np.random.Philox(key=[seed, key], counter=[0, 0, 1, repeat])
        draws.append(1.0 - np.random.Generator(bits).random(seq_len))
    return torch.from_numpy(np.stack(draws))


def orders_bound(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """-log of the mean probability over R random orders, and its variance.

    By Jensen's inequality its mean is at least the marginal's -log, falls as R grows, and is the
    NELBO at R = 1 (docs/math.md §9).

    Args:
        log_p: log-probability of each block under each order, float64 [R, ...].

    Returns:
        ``(nats, variance)`` of each block [...]; the variance is the jackknife's over orders.
    """
    repeats = len(log_p)
    nats = math.log(repeats) - torch.logsumexp(log_p, 0)
    others = [torch.cat([log_p[:r], log_p[r + 1 :]]) for r in range(repeats)]
    without = math.log(repeats - 1) - torch.stack([torch.logsumexp(x, 0) for x in others])
    spread = ((without - without.mean(0)) ** 2).sum(0)
    return nats, spread * (repeats - 1) / repeats


def _nothing(scorer: RowScorer) -> tuple[Tensor, Tensor]:
    shape, device = scorer.x0.shape, scorer.x0.device
    nats = torch.zeros(shape, dtype=torch.float64, device=device)
    return nats, torch.ones(shape[0], dtype=torch.bool, device=device)


def _highest(value: Tensor, hidden: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The hidden position of the highest value in each block, bool [B, L]; and that value [B, K].

    Blocks without a hidden position have none, and 0.
    """
    rows = len(hidden)
    blocks = torch.where(hidden, value, -torch.inf).view(rows, -1, block_size)
    top, index = blocks.max(-1)  # the first of equals
    at = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, index[..., None], True)
    return at.view(rows, -1) & hidden, torch.where(top.isinf(), 0.0, top)
