"""Variance of the loss between blocks, and the clip that has the least of it (docs/math.md §6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import check
from bd3lm.data import NoiseSpec, Rows, Schedule, draw_noise
from bd3lm.data.noise import MIN_LEVEL
from bd3lm.data.rows import CleanBatch
from bd3lm.device import uploaded
from bd3lm.evaluate.row_scorer import RowScorer
from bd3lm.model import Transformer
from bd3lm.ranks.group import ALONE, Ranks
from bd3lm.systems import System

Clip = tuple[float, float]

PIECES = 256
"""Pieces of each half of an integral over p, with a Gauss-Legendre rule of four points each."""


@torch.no_grad()
def nelbo_variance(
    system: System,
    model: Transformer,
    rows: Rows,
    spec: NoiseSpec,
    *,
    batches: int = 100,
    batch_size: int = 64,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> float:
    """Var. NELBO: unbiased variance over the blocks of a batch, averaged over batches.

    It is taken of each block's Σ weighted nats / S, the first block included. The variance of the
    text itself is part of it.

    Args:
        system: whose block size ``rows`` have.
        model: averaged weights, on its device.
        rows: held-out text.
        spec: the noise.
        batches: at most so many, from the beginning of the text.
        batch_size: rows of a batch, over which strata are laid.
        seed: of the noise.
        ranks: processes that share the batches.
    """
    model.eval()
    found = []
    for index in range(min(batches, max(len(rows) // batch_size, 1))):
        if not ranks.mine(index):
            continue
        first = index * batch_size
        batch = _rows(rows, first, batch_size)
        mask, level, weight = draw_noise(
            spec, batch.x0, batch.noisable, system.block_size, seed=seed, step=index
        )
        nats = RowScorer(system, model, batch)(mask, level).nats
        found.append((index, nats.view(*level.shape, -1).sum(-1), weight.numpy()))
    # The device is read after its last batch.
    variances = [
        (index, np.var(total.cpu().numpy() * weight / system.block_size, ddof=1))
        for index, total, weight in found
    ]
    return float(np.mean(ranks.shared(variances)))


@dataclass(frozen=True)
class CountStatistics:
    """First and second moments of Y_k, the nats of a block with k of its n noisable tokens masked.

    Everything a schedule's loss variance depends on, for a model that is not time-conditioned.

    Attributes:
        block_size: S.
        share: of the blocks that have n noisable tokens, float64 [S+1].
        mean: E[Y_k], float64 [S+1, S+1] by (n, k).
        square: E[Y_k²], likewise.
    """

    block_size: int
    share: NDArray[np.float64]
    mean: NDArray[np.float64]
    square: NDArray[np.float64]

    def variance(
        self,
        schedule: Schedule,
        clip: Clip,
        *,
        resample: bool = False,
        count_probs: NDArray[np.float64] | None = None,
    ) -> float:
        """Var. NELBO under t ~ U[a, b], by integration over p = p(t).

        With w(t) = p'/p, a moment ∫ w^j E[Y^j | p] dt / (b - a) is ∫ w^(j-1) E[Y^j | p] dp/p /
        (b - a): its integrand is smooth in p however steep p(t) is.

        Args:
            schedule: p(t) and w(t).
            clip: (a, b); a = 0 means 1e-3, (1, 1) masks everything at weight 1.
            resample: the masked share of each block is forced into [a, b].
            count_probs: q(k) for k = 1..S of the count estimator; None: independent masks.
        """
        low, high = max(clip[0], MIN_LEVEL), clip[1]
        if low >= 1.0:
            p = weight = step = np.ones(1)
        else:
            p, step = _nodes(*schedule.mask_prob([low, high]))
            weight = schedule.loss_weight_at(p)
            step /= p * (high - low)  # of w dt
        first = second = 0.0
        for n in np.flatnonzero(self.share[1:]) + 1:
            law = _binomial(int(n), p)  # [p, k]
            if resample:
                law = _within(law, clip)
            mean, square = (m[n, : n + 1] for m in (self.mean, self.square))
            factor = step @ law  # of Y_k in the clipped objective, by k
            first += self.share[n] * float(factor @ mean)
            if count_probs is None or low >= 1.0:
                spread = (step * weight) @ law
            else:
                q = count_probs[:n] / count_probs[:n].sum()
                spread = np.append(0.0, factor[1:] ** 2 / q)
            second += self.share[n] * float(spread @ square)
        return (second - first**2) / self.block_size**2


@torch.no_grad()
def count_statistics(
    system: System,
    model: Transformer,
    rows: Rows,
    *,
    max_rows: int = 64,
    repeats: int = 8,
    batch_size: int = 64,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> CountStatistics:
    """Moments of the loss by masked count, from one pass that serves all schedules and clips.

    Args:
        system: whose block size ``rows`` have.
        model: averaged weights; not time-conditioned.
        rows: held-out text.
        max_rows: spread evenly over it.
        repeats: forwards a row.
        batch_size: rows a forward.
        seed: of the noise.
        ranks: processes that share the batches.

    Raises:
        ConfigError: a time-conditioned model, whose Y_k differ from schedule to schedule.
    """
    told = model.cfg.time_conditioning
    check(not told, "noise.clip-search", True, "False with model.time-conditioning")
    model.eval()
    size = system.block_size
    spec = NoiseSpec(Schedule("loglinear"), estimator="count")
    found: list[tuple[int, Tensor, NDArray[np.int64]]] = []
    chosen = np.linspace(0, len(rows) - 1, min(max_rows, len(rows))).round().astype(np.uint64)
    for index, start in enumerate(range(0, len(chosen), batch_size)):
        if not ranks.mine(index):
            continue
        batch = rows.batch(chosen[start : start + batch_size])
        noisable = batch.noisable.view(-1, size).sum(1)
        scorer = RowScorer(system, model, batch)
        device = scorer.x0.device
        sums = torch.zeros(3, (size + 1) ** 2, dtype=torch.float64, device=device)
        found.append((index, sums, np.bincount(noisable.numpy(), minlength=size + 1)))
        for repeat in range(repeats):
            mask, level, _ = draw_noise(
                spec, batch.x0, batch.noisable, size, seed=seed, step=repeat, first_row=start
            )
            total = scorer(mask, level).nats.view(-1, size).sum(-1)
            place = uploaded(noisable * (size + 1) + mask.view(-1, size).sum(1), device)
            sums.index_add_(1, place, torch.stack([torch.ones_like(total), total, total**2]))
    # The device is read after its last batch.
    parts = ranks.shared(
        [(i, (s.view(3, size + 1, size + 1).cpu().numpy(), blocks)) for i, s, blocks in found]
    )
    shares = np.sum([part[1] for part in parts], axis=0)
    mean, square = _moments(np.sum([part[0] for part in parts], axis=0))
    return CountStatistics(size, shares / shares.sum(), mean, square)


def search_clip(
    statistics: CountStatistics,
    schedule: Schedule,
    *,
    resample: bool = False,
    count_probs: NDArray[np.float64] | None = None,
) -> tuple[Clip, float]:
    """The interval of least Var. NELBO, and that variance; see :meth:`CountStatistics.variance`."""
    found = {
        clip: statistics.variance(schedule, clip, resample=resample, count_probs=count_probs)
        for clip in clip_candidates(statistics.block_size)
        if not resample or _holds_a_share(clip, statistics.block_size)
    }
    best = min(found, key=lambda clip: found[clip])
    return best, found[best]


def clip_candidates(block_size: int) -> list[Clip]:
    """Everything, and all [a, a + δ] of δ = .5 … .9 and a on a grid of 0.05 (docs/math.md §6).

    Examples:
        >>> len(clip_candidates(4)), len(clip_candidates(1))
        (36, 37)
    """
    clips = [(MIN_LEVEL, 1.0)]
    for width in (50, 60, 70, 80, 90):
        clips += [(low / 100, (low + width) / 100) for low in range(0, 101 - width, 5)]
    return [*clips, (1.0, 1.0)] if block_size == 1 else clips


# --- details ---------------------------------------------------------------------------------


def _rows(rows: Rows, first: int, count: int) -> CleanBatch:
    last = min(first + count, len(rows))
    return rows.batch(np.arange(first, last, dtype=np.uint64))


def _moments(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means by (n, k) from the sums of 1, Y and Y².

    Counts of a short block (a row's first or last) that no draw has met are interpolated.
    """
    number = sums[0]
    size = number.shape[0] - 1
    out = np.zeros((2, size + 1, size + 1))
    for n in range(1, size + 1):
        known = np.flatnonzero(number[n, : n + 1])
        if len(known) == 0:
            continue
        known = known[known > 0]
        for moment in range(2):
            values = sums[1 + moment, n, known] / number[n, known]
            at = np.arange(n + 1)
            out[moment, n, : n + 1] = np.interp(at, [0, *known], [0.0, *values])
    return out[0], out[1]


def _nodes(low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points and weights of ∫ dp from ``low`` to ``high``.

    Pieces are even in log p below one half, where weights rise like 1/p², and even in p above.
    """
    middle = min(max(0.5, low), high)
    edges = np.unique(
        np.append(np.geomspace(low, middle, PIECES + 1), np.linspace(middle, high, PIECES + 1))
    )
    point, weight = np.polynomial.legendre.leggauss(4)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + point)).ravel(), (half * weight).ravel()


def _binomial(n: int, p: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(k of n) for k = 0..n, [len(p), n+1]."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    choose = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    with np.errstate(divide="ignore", invalid="ignore"):
        hit = np.where(k > 0, k * np.log(p)[:, None], 0.0)
        miss = np.where(k < n, (n - k) * np.log1p(-p)[:, None], 0.0)
    return np.exp(choose + hit + miss)


def _within(law: NDArray[np.float64], clip: Clip) -> NDArray[np.float64]:
    """The law of counts given that their share lies in the clip; as it is where none does."""
    n = law.shape[1] - 1
    fits = _fits(np.arange(n + 1) / n, clip)
    if not fits.any():
        return law
    kept = np.where(fits, law, 0.0)
    return kept / kept.sum(axis=1, keepdims=True)


def _fits(share: NDArray[np.float64], clip: Clip) -> NDArray[np.bool_]:
    """Shares inside a clip; a bound at 1e-3 or 1 does not bind."""
    low, high = clip
    return ((share >= low - 1e-9) | (low <= MIN_LEVEL)) & ((share <= high + 1e-9) | (high >= 1.0))


def _holds_a_share(clip: Clip, block_size: int) -> bool:
    """Return whether some k >= 1 fits; an interval that holds k = 0 alone has no loss."""
    return bool(_fits(np.arange(1, block_size + 1) / block_size, clip).any())
