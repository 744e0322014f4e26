"""Masks of the NELBO's estimators (docs/math.md §4): every subset of a block, or random ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import EstimatorName
from bd3lm.data import NoiseSpec, Schedule, draw_noise
from bd3lm.data.rows import CleanBatch


class Draw(NamedTuple):
    """One noised version of a batch: masks [B, L] and the weight of each masked position."""

    mask: Tensor
    weight: Tensor
    """float32 [B, K]: one weight a block."""
    mask_prob: Tensor
    """float32 [B, K]: the level of each block, read by time-conditioned models."""
    share: float
    """Factor of this draw in the estimate of its group."""
    group: int
    """Draws of one group add up to one independent estimate."""


def exact_draws(noisable: Tensor, block_size: int) -> Iterator[Draw]:
    """Yield all 2^S - 1 patterns; a block takes part in those that mask noisable positions alone.

    The weight is B(|M|, n-|M|+1) (docs/math.md §4): the sum over patterns is the exact NELBO of a
    model without time conditioning.

    Args:
        noisable: bool [B, L].
        block_size: S <= 4.
    """
    rows, seq_len = noisable.shape
    blocks = noisable.view(rows, -1, block_size)
    count = blocks.sum(-1)  # n of each block
    for size in range(1, block_size + 1):
        weight = torch.tensor([beta(size, n) for n in range(block_size + 1)])[count]
        for pattern in itertools.combinations(range(block_size), size):
            chosen = torch.zeros(block_size, dtype=torch.bool)
            chosen[list(pattern)] = True
            fits = (blocks | ~chosen).all(-1)
            mask = (fits[..., None] & chosen).view(rows, seq_len)
            if mask.any():
                level = torch.zeros_like(weight)  # not read: time conditioning has no exact sum
                yield Draw(mask, torch.where(fits, weight, 0.0), level, 1.0, 0)


def beta(k: int, n: int) -> float:
    """B(k, n-k+1) = (k-1)! (n-k)! / n!, the weight of one subset of size k among n; else 0."""
    if not 1 <= k <= n:
        return 0.0
    return math.exp(math.lgamma(k) + math.lgamma(n - k + 1) - math.lgamma(n + 1))


def sampled_draws(
    batch: CleanBatch,
    block_size: int,
    estimator: EstimatorName,
    repeats: int,
    *,
    seed: int,
    keys: NDArray[np.uint64],
    num_rows: int,
    schedule: Schedule,
) -> Iterator[Draw]:
    """Yield ``repeats`` random draws, unbiased together (docs/math.md §4).

    ``stratified`` makes two independent groups of repeats/2 strata each, so that their
    difference measures the error; the others make every draw its own group. A draw is a function
    of (seed, repeat, key of the row), so a score changes with neither the batch nor its order,
    and any two seeds are independent.

    Args:
        batch: the rows.
        block_size: S.
        estimator: stratified, count or bernoulli.
        repeats: number of draws.
        seed: of the evaluation.
        keys: names the randomness of each row, uint64 [B].
        num_rows: rows over which ``bernoulli`` lays its strata; its keys are below that.
        schedule: levels of ``bernoulli``.
    """
    for repeat in range(repeats):
        share, group = 1.0, repeat
        if estimator == "stratified":
            strata = repeats // 2
            spec = NoiseSpec(schedule, estimator="count", stratum=(repeat % strata, strata))
            share, group = 1.0 / strata, repeat // strata
        else:
            spec = NoiseSpec(schedule, estimator=estimator)
        parts = [
            draw_noise(
                spec,
                batch.x0[part],
                batch.noisable[part],
                block_size,
                seed=seed,
                step=repeat,
                first_row=int(keys[part.start]),
                num_rows=num_rows if estimator == "bernoulli" else None,
            )
            for part in _consecutive(keys)
        ]
        mask, mask_prob, weight = (torch.cat(x) for x in zip(*parts, strict=True))
        yield Draw(mask, weight, mask_prob, share, group)


def _consecutive(keys: NDArray[np.uint64]) -> list[slice]:
    """Runs of keys that follow each other by one, which one call draws."""
    cuts = np.flatnonzero(np.diff(keys) != 1) + 1
    edges = [0, *cuts.tolist(), len(keys)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
