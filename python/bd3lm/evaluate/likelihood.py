"""Likelihoods of rows: the NELBO, exact marginals and orders, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import EstimatorName, LikelihoodName, check, check_estimator, check_likelihood
from bd3lm.data import Schedule
from bd3lm.data.rows import CleanBatch
from bd3lm.device import uploaded
from bd3lm.evaluate.draws import Draw, exact_draws, sampled_draws
from bd3lm.evaluate.marginal import score_subsets
from bd3lm.evaluate.orders import (
    by_confidence,
    by_level,
    left_to_right,
    orders_bound,
    random_levels,
)
from bd3lm.evaluate.row_scorer import RowScorer
from bd3lm.model import Transformer
from bd3lm.model.threads import adaptive_waiting
from bd3lm.ranks.group import ALONE, Ranks
from bd3lm.systems import System

T = TypeVar("T")


class RowSource(Protocol):
    """Rows to score, :class:`bd3lm.data.Rows` for one."""

    block_size: int
    row_eos: bool

    def __len__(self) -> int: ...

    @property
    def num_stream_tokens(self) -> int:
        """Tokens of the whole text."""
        ...

    def batch(self, rows: NDArray[np.uint64]) -> CleanBatch:
        """The rows of these numbers."""
        ...


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of a text, or an upper bound on it.

    Attributes:
        likelihood: which one: ``nelbo`` and ``orders`` are upper bounds, the others are exact for
            the sampler that they belong to.
        nll: nats a scored token: Σ nats / Σ tokens over the whole set (docs/math.md §1).
        nelbo: the NELBO from the same forwards; None where they do not give it.
        ppl: exp(nll).
        bpb: bits a UTF-8 byte of the raw text; None unless the whole set was scored.
        tokens: scored tokens (EOS included; BOS, padding and context are not).
        coverage: share of the data set's tokens that were scored.
        mc_error: standard error of ``nll`` from the estimator's own randomness; 0 for exact.
        data_error: standard error from the choice of rows; None for a single row.
        estimator: exact, stratified, count, bernoulli, or orders.
        forwards: denoiser forwards a row, the clean stream's one included.
        row_nats: nats of each scored row, for paired comparisons.
        row_tokens: scored tokens of each.
        token_ids: the scored tokens in order, int64 [tokens]; None without ``per_token``.
        token_nats: nats of each of them; None without ``per_token``, and for marginal and orders,
            whose nats belong to a whole block.
        row_greedy: whether greedy decoding gives each row; None without ``greedy``.
    """

    likelihood: LikelihoodName
    nll: float
    nelbo: float | None
    ppl: float
    bpb: float | None
    tokens: int
    coverage: float
    mc_error: float
    data_error: float | None
    estimator: str
    forwards: int
    row_nats: NDArray[np.float64] = field(repr=False, compare=False)
    row_tokens: NDArray[np.int64] = field(repr=False, compare=False)
    token_ids: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    token_nats: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    row_greedy: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types, without rows and tokens."""
        return {k: v for k, v in vars(self).items() if not k.startswith(("row_", "token_"))}


@dataclass
class RowScores:
    """Scores of a batch of rows, on the device of the model.

    Attributes:
        nats: of each row, float64 [B].
        variance: of ``nats`` under the estimator's own randomness [B].
        nelbo: each row's NELBO from the same forwards, or None.
        tokens: nats of each token [B, L], or None where they belong to a whole block.
        correct: whether greedy decoding gives the row, bool [B].
        forwards: a row.
    """

    nats: Tensor
    variance: Tensor
    nelbo: Tensor | None
    tokens: Tensor | None
    correct: Tensor
    forwards: int


@dataclass(frozen=True)
class Measure:
    """Likelihood to compute of each row, and its randomness.

    Attributes:
        likelihood: which one.
        estimator: of the NELBO.
        repeats: draws of a sampled NELBO; orders of the multi-order bound.
        seed: of both.
        schedule: levels of the ``bernoulli`` estimator.
    """

    likelihood: LikelihoodName = "nelbo"
    estimator: EstimatorName = "stratified"
    repeats: int = 8
    seed: int = 0
    schedule: Schedule | None = None

    def check(self, system: System, model: Transformer) -> None:
        """Check that the model has this likelihood.

        Raises:
            ConfigError: it has not, or there are too few repeats.
        """
        conditioned = model.cfg.time_conditioning
        if self.likelihood == "nelbo":
            check_estimator(self.estimator, system.block_size, self.repeats, conditioned)
        check_likelihood(
            self.likelihood,
            system.block_size,
            self.repeats,
            time_conditioned=conditioned,
            unnormalized=system.unnormalized_scores,
        )

    @property
    def name(self) -> str:
        """The estimator, as results name it."""
        if self.likelihood == "nelbo":
            return self.estimator
        return "orders" if self.likelihood == "orders" else "exact"

    def take(
        self, scorer: RowScorer, batch: CleanBatch, keys: NDArray[np.uint64], num_rows: int
    ) -> RowScores:
        """Score a batch.

        Args:
            scorer: of its rows.
            batch: the rows.
            keys: names the randomness of each row [B].
            num_rows: rows that ``bernoulli`` spreads its levels over.
        """
        if self.likelihood == "marginal":
            return _marginal(scorer)
        if self.likelihood == "orders":
            return _orders(scorer, self, keys)
        if self.likelihood == "left-to-right":
            return _one_order(scorer, *left_to_right(scorer))
        if self.likelihood == "confidence":
            return _one_order(scorer, *by_confidence(scorer))
        if self.estimator == "exact":
            return _nelbo(scorer, exact_draws(batch.noisable, scorer.block_size), 1)
        draws = sampled_draws(
            batch,
            scorer.block_size,
            self.estimator,
            self.repeats,
            seed=self.seed,
            keys=keys,
            num_rows=num_rows,
            schedule=self.schedule or Schedule("loglinear"),
        )
        return _nelbo(scorer, draws, 2 if self.estimator == "stratified" else self.repeats)


def _nelbo(scorer: RowScorer, draws: Iterable[Draw], groups: int) -> RowScores:
    """Σ weight·nats over the draws; ``groups`` of them are independent estimates."""
    shape, device = scorer.x0.shape, scorer.x0.device
    nats = torch.zeros(groups, shape[0], dtype=torch.float64, device=device)
    tokens = torch.zeros(shape, dtype=torch.float64, device=device)
    correct = torch.ones(shape[0], dtype=torch.bool, device=device)
    for draw in draws:
        found = scorer(draw.mask, draw.mask_prob)
        weight = draw.weight.double().repeat_interleave(scorer.block_size, dim=1) * draw.share
        weighted = found.nats * uploaded(weight, device)
        nats[draw.group] += weighted.sum(1)
        tokens += weighted / groups
        if found.correct is not None:
            correct &= found.correct.all(1)
    # Draws are independent between rows; the bernoulli estimator's strata tie them together in a
    # way that only lowers the true error.
    variance = nats.var(0) / groups if groups > 1 else torch.zeros_like(nats[0])
    mean = nats.mean(0)
    return RowScores(mean, variance, mean, tokens, correct, scorer.forwards)


def _marginal(scorer: RowScorer) -> RowScores:
    found = score_subsets(scorer)
    nats, nelbo = found.marginal.sum(1), found.nelbo.sum(1)
    return RowScores(nats, torch.zeros_like(nats), nelbo, None, found.correct, scorer.forwards)


def _one_order(scorer: RowScorer, tokens: Tensor, correct: Tensor) -> RowScores:
    nats = tokens.sum(1)
    return RowScores(nats, torch.zeros_like(nats), None, tokens, correct, scorer.forwards)


def _orders(scorer: RowScorer, measure: Measure, keys: NDArray[np.uint64]) -> RowScores:
    """The multi-order bound; the mean over its orders is the NELBO, estimated."""
    rows, seq_len = scorer.x0.shape
    blocks, correct = [], torch.ones(rows, dtype=torch.bool, device=scorer.x0.device)
    conditioned = scorer.model.cfg.time_conditioning
    for repeat in range(measure.repeats):
        level = random_levels(measure.seed, repeat, keys, seq_len)
        tokens, right = by_level(scorer, level, time_conditioned=conditioned)
        blocks.append(-tokens.view(rows, -1, scorer.block_size).sum(-1))
        correct &= right
    log_p = torch.stack(blocks)
    nats, variance = orders_bound(log_p)
    nelbo = -log_p.mean(0).sum(1)
    return RowScores(nats.sum(1), variance.sum(1), nelbo, None, correct, scorer.forwards)


@torch.no_grad()
@adaptive_waiting()
def evaluate_likelihood(
    system: System,
    model: Transformer,
    rows: RowSource,
    *,
    likelihood: LikelihoodName = "nelbo",
    estimator: EstimatorName = "stratified",
    repeats: int = 8,
    batch_size: int = 64,
    max_rows: int | None = None,
    num_bytes: int | None = None,
    seed: int = 0,
    schedule: Schedule | None = None,
    per_token: bool = False,
    greedy: bool = False,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Likelihood:
    """Score rows, each noisable token once an estimate.

    Args:
        system: its block size is the one of ``rows``.
        model: weights to score with; left in evaluation mode.
        rows: the packed data set.
        likelihood: nelbo; marginal (of the first-hitting sampler, S <= 8), left-to-right or
            confidence (of those orders), all three exact; orders (the bound on the marginal from
            ``repeats`` random orders).
        estimator: of the NELBO: exact (S <= 4), stratified, count or bernoulli (on [1e-3, 1]; it
            misses the mass below, docs/math.md §2).
        repeats: draws a row of the sampled estimators, even and at least 2 for stratified; random
            orders.
        batch_size: rows a forward.
        max_rows: score only that many rows, spread evenly over the set.
        num_bytes: UTF-8 bytes of the whole set, for bits per byte.
        seed: of the sampled estimators, any 64-bit number; any two seeds are independent.
        schedule: bernoulli: how levels are drawn; the bound is the same under each of them.
            None: loglinear.
        per_token: keep every token's nats.
        greedy: find out whether greedy decoding gives each row: in this order, or in every order
            that was scored. Costs the logits of the whole vocabulary.
        progress: called with (rows done, rows in all).
        ranks: processes that share the batches; all get the result of one process, bit for bit.

    Raises:
        ConfigError: a likelihood or an estimator that the model or its block size does not have,
            or a number out of range.
    """
    measure = Measure(likelihood, estimator, repeats, seed % (1 << 64), schedule)
    measure.check(system, model)
    check(batch_size >= 1, "batch-size", batch_size, "at least 1")
    check(max_rows is None or max_rows >= 1, "rows", max_rows, "at least 1")
    model.eval()
    chosen = _spread(len(rows), max_rows)
    scores = _Totals(rows, len(chosen), per_token, greedy)

    def scored() -> Iterator[tuple[int, CleanBatch, RowScores]]:
        for index, start in enumerate(range(0, len(chosen), batch_size)):
            if not ranks.mine(index):
                continue
            numbers = chosen[start : start + batch_size]
            batch = rows.batch(numbers)
            scorer = RowScorer(
                system, model, batch, whole_distribution=greedy or likelihood == "confidence"
            )
            keys = _keys(rows, numbers, start)
            yield start, batch, measure.take(scorer, batch, keys, len(chosen))

    for start, batch, found in _one_behind(scored()):
        scores.add(start, batch, found)
        if progress is not None:
            progress(start + len(found.nats), len(chosen))
    scores.merge(ranks)
    return scores.result(measure, num_bytes)


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Yield each item after the next one was made, so that a GPU has work while one is read."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def _spread(total: int, most: int | None) -> NDArray[np.uint64]:
    """Row numbers, evenly over the set."""
    if most is None or most >= total:
        return np.arange(total, dtype=np.uint64)
    return np.linspace(0, total - 1, most).round().astype(np.uint64)


def _keys(rows: RowSource, numbers: NDArray[np.uint64], start: int) -> NDArray[np.uint64]:
    """Names of the rows' randomness: their own where they have any, else their places."""
    own = getattr(rows, "keys", None)
    if own is not None:
        return own[numbers]
    return np.arange(start, start + len(numbers), dtype=np.uint64)


class _Totals:
    """Scores of all rows, gathered batch by batch."""

    def __init__(self, rows: RowSource, count: int, per_token: bool, greedy: bool) -> None:
        self.rows, self.count = rows, count
        self.nats, self.variance, self.tokens = (np.zeros(count) for _ in range(3))
        self.nelbo: NDArray[np.float64] | None = np.zeros(count)
        self.greedy = np.zeros(count, dtype=bool) if greedy else None
        self.ids: list[tuple[int, NDArray[np.int64]]] | None = [] if per_token else None
        self.token_nats: list[tuple[int, NDArray[np.float64]]] | None = [] if per_token else None
        self.forwards = 0

    def add(self, start: int, batch: CleanBatch, found: RowScores) -> None:
        """Add the rows from place ``start`` on."""
        part = slice(start, start + len(found.nats))
        self.nats[part], self.variance[part] = _read(found.nats), _read(found.variance)
        self.tokens[part] = batch.noisable.sum(1).numpy()
        self.forwards = max(self.forwards, found.forwards)
        if found.nelbo is None:
            self.nelbo = None
        elif self.nelbo is not None:
            self.nelbo[part] = _read(found.nelbo)
        if self.greedy is not None:
            self.greedy[part] = _read(found.correct)
        if self.ids is not None:
            self.ids.append((start, batch.x0[batch.noisable].numpy()))
        if found.tokens is None:
            self.token_nats = None
        elif self.token_nats is not None:
            self.token_nats.append((start, _read(found.tokens)[batch.noisable.numpy()]))

    def merge(self, ranks: Ranks) -> None:
        """Take over the rows of the other ranks; a row is scored by one of them."""
        if ranks.size == 1:
            return
        for values in (self.nats, self.variance, self.tokens):
            ranks.sum(torch.from_numpy(values))
        if self.greedy is not None:
            self.greedy = np.logical_or.reduce(ranks.gather(self.greedy))
        found = ranks.gather(self.nelbo)
        nelbo = [part for part in found if part is not None]
        self.nelbo = np.sum(nelbo, axis=0) if len(nelbo) == len(found) else None
        self.ids = _merged(self.ids, ranks)
        self.token_nats = _merged(self.token_nats, ranks)
        (self.forwards,) = ranks.largest(self.forwards)

    def result(self, measure: Measure, num_bytes: int | None) -> Likelihood:
        """Everything over everything."""
        count, scored = self.count, self.tokens.sum()
        nll = self.nats.sum() / scored
        # Rows as clusters of tokens: the usual standard error of a ratio.
        residual = self.nats - nll * self.tokens
        data = None
        if count > 1:
            data = float(math.sqrt((residual**2).sum() * count / (count - 1)) / scored)
        whole = num_bytes if count == len(self.rows) else None
        bpb = None if not whole else float(self.nats.sum() / math.log(2) / whole)
        stream = self.rows.num_stream_tokens
        return Likelihood(
            likelihood=measure.likelihood,
            nll=float(nll),
            nelbo=None if self.nelbo is None else float(self.nelbo.sum() / scored),
            ppl=math.exp(min(nll, 700.0)),
            bpb=bpb,
            tokens=int(scored),
            coverage=float((scored - self.rows.row_eos * count) / stream),
            mc_error=float(math.sqrt(self.variance.sum()) / scored),
            data_error=data,
            estimator=measure.name,
            forwards=self.forwards,
            row_nats=self.nats,
            row_tokens=self.tokens.astype(np.int64),
            token_ids=_joined(self.ids),
            token_nats=_joined(self.token_nats),
            row_greedy=self.greedy,
        )


def _read(values: Tensor) -> NDArray[Any]:
    return values.cpu().numpy()


def _merged(parts: list[tuple[int, Any]] | None, ranks: Ranks) -> list[tuple[int, Any]] | None:
    """Parts of all ranks by their places; None where one rank has none."""
    found = ranks.gather(parts)
    if any(part is None for part in found):
        return None
    return sorted((pair for part in found for pair in part or []), key=lambda pair: pair[0])


def _joined(parts: list[tuple[int, Any]] | None) -> NDArray[Any] | None:
    return None if parts is None else np.concatenate([values for _, values in parts])
