"""Likelihood by the estimators of MATH §4, with their standard errors and bits per byte."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import EstimatorName, TrainConfig, check_estimator
from bd3lm.data import Dataset, NoiseSpec, Rows, Schedule, draw_noise
from bd3lm.data.rows import CleanBatch
from bd3lm.model import Transformer
from bd3lm.systems import Scorer, System


@dataclass(frozen=True)
class Likelihood:
    """A bound on the negative log-likelihood of a data set.

    Attributes:
        nelbo: nats a scored token: Σ nats / Σ tokens over the whole set (MATH §1).
        ppl: exp(nelbo).
        bpb: bits a UTF-8 byte of the raw text; None unless the whole set was scored.
        tokens: scored tokens (EOS included; BOS, padding and context are not).
        coverage: share of the data set's tokens that were scored.
        mc_error: standard error of ``nelbo`` from the estimator's own randomness; 0 for exact.
        data_error: standard error from the choice of rows.
        estimator: exact, stratified, count or bernoulli.
        forwards: denoiser forwards a row, the clean stream's one included.
        row_nats: nats of each scored row, for paired comparisons.
        row_tokens: scored tokens of each.
    """

    nelbo: float
    ppl: float
    bpb: float | None
    tokens: int
    coverage: float
    mc_error: float
    data_error: float
    estimator: str
    forwards: int
    row_nats: NDArray[np.float64] = field(repr=False, compare=False)
    row_tokens: NDArray[np.int64] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, without the rows."""
        return {k: v for k, v in vars(self).items() if not k.startswith("row_")}


def scoring_rows(cfg: TrainConfig, data: Dataset) -> Rows:
    """The rows a run is scored on: packed as its training rows are, with nothing left out.

    Args:
        cfg: settings of the run; ``eval.stride`` lets the rows overlap.
        data: what to score.
    """
    return Rows(
        data,
        seq_len=cfg.seq_len,
        block_size=cfg.block,
        plan=cfg.packing,
        row_eos=cfg.row_eos,
        stride=cfg.eval.stride,
        keep_last=True,
    )


class Draw(NamedTuple):
    """One noised version of a batch: masks [B, L] and the weight of each masked position."""

    mask: Tensor
    weight: Tensor
    """float32 [B, K]: one weight a block."""
    mask_prob: Tensor
    """float32 [B, K]: the level of each block, for a model that is told it."""
    share: float
    """Factor of this draw in the estimate of its group."""
    group: int
    """Draws of one group add up to one independent estimate."""


def exact_draws(noisable: Tensor, block_size: int) -> Iterator[Draw]:
    """All 2^S - 1 patterns; a block takes part in those that mask noisable positions alone.

    The weight is B(|M|, n-|M|+1) (MATH §4), so the sum over patterns is the exact NELBO of a
    model that is not told the level.

    Args:
        noisable: bool [B, L].
        block_size: S <= 4.
    """
    rows, seq_len = noisable.shape
    blocks = noisable.view(rows, -1, block_size)
    count = blocks.sum(-1)  # n of each block
    for size in range(1, block_size + 1):
        weight = torch.tensor([_beta(size, n) for n in range(block_size + 1)])[count]
        for pattern in itertools.combinations(range(block_size), size):
            chosen = torch.zeros(block_size, dtype=torch.bool)
            chosen[list(pattern)] = True
            fits = (blocks | ~chosen).all(-1)
            mask = (fits[..., None] & chosen).view(rows, seq_len)
            if mask.any():
                level = torch.zeros_like(
                    weight
                )  # not read: a model that is told it has no exact sum
                yield Draw(mask, torch.where(fits, weight, 0.0), level, 1.0, 0)


def _beta(k: int, n: int) -> float:
    """B(k, n-k+1) = (k-1)! (n-k)! / n!, the weight of one subset of size k among n."""
    if k > n:
        return 0.0
    return math.exp(math.lgamma(k) + math.lgamma(n - k + 1) - math.lgamma(n + 1))


def sampled_draws(
    batch: CleanBatch,
    block_size: int,
    estimator: EstimatorName,
    repeats: int,
    *,
    seed: int,
    first_row: int,
    num_rows: int,
    schedule: Schedule,
) -> Iterator[Draw]:
    """Random draws of MATH §4: ``repeats`` of them, unbiased together.

    ``stratified`` makes two independent groups of repeats/2 strata each, so that their
    difference measures the error; the others make every draw its own group. Draws are keyed by
    the row's place among ``num_rows``, so a score does not change with the batch.
    """
    for repeat in range(repeats):
        share, group = 1.0, repeat
        if estimator == "stratified":
            strata = repeats // 2
            spec = NoiseSpec(schedule, estimator="count", stratum=(repeat % strata, strata))
            share, group = 1.0 / strata, repeat // strata
        else:
            spec = NoiseSpec(schedule, estimator=estimator)
        mask, mask_prob, weight = draw_noise(
            spec,
            batch.x0,
            batch.noisable,
            block_size,
            seed=seed + repeat,
            step=0,
            first_row=first_row,
            num_rows=num_rows,
        )
        yield Draw(mask, weight, mask_prob, share, group)


@torch.no_grad()
def evaluate_likelihood(
    system: System,
    model: Transformer,
    rows: Rows,
    *,
    estimator: EstimatorName = "stratified",
    repeats: int = 8,
    batch_size: int = 64,
    max_rows: int | None = None,
    num_bytes: int | None = None,
    seed: int = 0,
    schedule: Schedule | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Score rows, each noisable token once an estimate.

    Args:
        system: what is scored; its block size is the one of ``rows``.
        model: weights to score with; left in evaluation mode.
        rows: the packed data set.
        estimator: exact (S <= 4), stratified, count or bernoulli (on [1e-3, 1]; it misses the
            mass below, MATH §2).
        repeats: draws a row of the sampled estimators; even and at least 2 for stratified.
        batch_size: rows a forward.
        max_rows: score only that many rows, spread evenly over the set.
        num_bytes: UTF-8 bytes of the whole set, for bits per byte.
        seed: of the sampled estimators.
        schedule: bernoulli: how levels are drawn; the bound is the same under each of them.
            None: loglinear.
        progress: called with (rows done, rows in all).

    Raises:
        ConfigError: an estimator the block size does not allow, or too few repeats.
    """
    block_size = system.block_size
    check_estimator(estimator, block_size, repeats, model.cfg.time_conditioning)
    model.eval()
    total = len(rows)
    chosen = np.arange(total, dtype=np.uint64)
    if max_rows is not None and max_rows < total:
        chosen = np.linspace(0, total - 1, max_rows).round().astype(np.uint64)
    groups = 1 if estimator == "exact" else 2 if estimator == "stratified" else repeats

    nats = np.zeros((groups, len(chosen)))
    tokens = np.zeros(len(chosen))
    forwards = 0
    for start in range(0, len(chosen), batch_size):
        batch = rows.batch(chosen[start : start + batch_size])
        part = slice(start, start + batch.x0.shape[0])
        tokens[part] = batch.noisable.sum(1).numpy()
        if estimator == "exact":
            draws = exact_draws(batch.noisable, block_size)
        else:
            draws = sampled_draws(
                batch,
                block_size,
                estimator,
                repeats,
                seed=seed,
                first_row=start,
                num_rows=len(chosen),
                schedule=schedule or Schedule("loglinear"),
            )
        score, x0 = batch_scorer(system, model, batch)
        used = system.preparing_forwards(x0.shape[1])
        sums = torch.zeros(groups, len(x0), dtype=torch.float64, device=x0.device)
        for draw in draws:
            sums[draw.group] += draw.share * _weighted_nats(
                score, x0, draw, system.mask_id, block_size
            )
            used += 1
        nats[:, part] = sums.cpu().numpy()  # the one wait of a batch
        forwards = max(forwards, used)
        if progress is not None:
            progress(part.stop, len(chosen))
    complete = len(chosen) == total
    return _summarise(nats, tokens, estimator, forwards, rows, num_bytes if complete else None)


def _weighted_nats(
    score: Scorer,
    x0: Tensor,
    draw: Draw,
    mask_id: int,
    block_size: int,
) -> Tensor:
    """Σ weight·CE of each row under one draw, float64 [B], where the model is."""
    weight = draw.weight.double().repeat_interleave(block_size, dim=1)
    nats = masked_nats(score, x0, draw.mask, draw.mask_prob, mask_id)
    return (nats * weight.to(nats.device, non_blocking=True)).sum(1)


def batch_scorer(system: System, model: Transformer, batch: CleanBatch) -> tuple[Scorer, Tensor]:
    """A scorer of these rows on the model's device, and their clean ids there."""
    device = next(model.parameters()).device
    x0 = batch.x0.to(device)
    doc_ids = None if batch.doc_ids is None else batch.doc_ids.to(device)
    return system.scorer(model, x0, doc_ids), x0


def masked_nats(score: Scorer, x0: Tensor, mask: Tensor, mask_prob: Tensor, mask_id: int) -> Tensor:
    """Unweighted loss of the masked positions, 0 elsewhere: float64 [B, L], where the model is.

    The host reads nothing back: it knows the mask, and so which positions are scored.

    Args:
        score: of these rows.
        x0: clean ids [B, L], where the model is.
        mask: bool [B, L], on the CPU.
        mask_prob: level of each block [B, K], on the CPU.
        mask_id: the noise.
    """
    device = x0.device
    select = mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
    xt = torch.where(mask.to(device, non_blocking=True), mask_id, x0)
    values = torch.zeros(x0.numel(), dtype=torch.float64, device=device)
    values[select] = score(xt, select, mask_prob.to(device, non_blocking=True)).double()
    return values.view(x0.shape)


def _summarise(
    nats: np.ndarray,
    tokens: np.ndarray,
    estimator: str,
    forwards: int,
    rows: Rows,
    num_bytes: int | None,
) -> Likelihood:
    groups, count = nats.shape
    row_nats = nats.mean(0)
    scored = tokens.sum()
    nelbo = row_nats.sum() / scored
    # Draws are independent between rows, so their variances add up; the bernoulli estimator's
    # strata tie them together in a way that only lowers the true error.
    variance = nats.var(0, ddof=1).sum() / groups if groups > 1 else 0.0
    # Rows as clusters of tokens: the usual standard error of a ratio.
    residual = row_nats - nelbo * tokens
    data = math.sqrt((residual**2).sum() * count / max(count - 1, 1)) / scored
    bpb = None if not num_bytes else float(row_nats.sum() / math.log(2) / num_bytes)
    return Likelihood(
        nelbo=float(nelbo),
        ppl=math.exp(min(nelbo, 700.0)),
        bpb=bpb,
        tokens=int(scored),
        coverage=float((scored - rows.row_eos * count) / rows.num_stream_tokens),
        mc_error=math.sqrt(variance) / scored,
        data_error=data,
        estimator=estimator,
        forwards=forwards,
        row_nats=row_nats,
        row_tokens=tokens.astype(np.int64),
    )
