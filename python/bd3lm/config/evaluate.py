"""Likelihood: estimators, and validation during a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bd3lm.config.check import check, check_whole
from bd3lm.config.names import EstimatorName, LikelihoodName

MAX_EXACT_BLOCK = 4
"""Largest S whose 2^S - 1 masks are all run by the exact estimator of the NELBO."""
MAX_MARGINAL_BLOCK = 8
"""Largest S whose marginal likelihood is computed: 256 forwards a row, one of the clean stream."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation during and after training, always with the averaged weights."""

    every: int = 0
    """Steps between quick validations; 0: only at the end."""
    rows: int = 64
    """Rows of a quick validation."""
    final_rows: int | None = None
    """Rows of the validation after the last step, spread evenly over the text. None: all."""
    estimator: Literal["auto"] | EstimatorName = "auto"
    """auto: exact up to S = 4, stratified above."""
    repeats: int = 8
    """Forwards of the sampled estimators."""
    stride: int | None = None
    """Score only the last `stride` tokens of each row, so that every token but those of the
    first row is seen with seq_len - stride tokens of context. None: rows do not overlap."""
    batch_size: int = 64
    """Rows a forward."""

    def __post_init__(self) -> None:
        check_whole("eval.every", self.every, 0)
        check_whole("eval.rows", self.rows, 1)
        if self.final_rows is not None:
            check_whole("eval.final-rows", self.final_rows, 1)
        check_whole("eval.repeats", self.repeats, 1)
        check_whole("eval.batch-size", self.batch_size, 1)
        if self.stride is not None:
            check_whole("eval.stride", self.stride, 1)


def check_estimator(
    estimator: EstimatorName,
    block_size: int,
    repeats: int,
    time_conditioned: bool,
    prefix: str = "",
) -> None:
    """Raise :class:`ConfigError` where an estimator does not go with a model or its repeats.

    Args:
        estimator: of the likelihood, not ``auto``.
        block_size: S.
        repeats: forwards of the sampled estimators.
        time_conditioned: whether the model reads the noise level.
        prefix: of the settings' names in the message.
    """
    check(
        estimator != "exact" or block_size <= MAX_EXACT_BLOCK,
        f"{prefix}estimator",
        estimator,
        f"a sampled one, stratified say, above block-size = {MAX_EXACT_BLOCK} (here {block_size})",
    )
    check(
        estimator != "exact" or not time_conditioned,
        f"{prefix}estimator",
        estimator,
        "a sampled one, stratified say: a time-conditioned model has no exact sum",
    )
    check(
        estimator != "stratified" or (repeats >= 2 and repeats % 2 == 0),
        f"{prefix}repeats",
        repeats,
        "an even number, at least 2, for stratified",
    )
    check(
        estimator in ("exact", "stratified") or repeats >= 2,
        f"{prefix}repeats",
        repeats,
        "at least 2, so that the error can be estimated",
    )


def check_likelihood(
    likelihood: LikelihoodName,
    block_size: int,
    repeats: int,
    *,
    time_conditioned: bool,
    unnormalized: bool,
) -> None:
    """Raise :class:`ConfigError` where a likelihood is not defined for a model.

    A time-conditioned model has bounds alone: its predictions change with the level, which no
    order fixes. Scores that need not sum to one have the NELBO alone.

    Args:
        likelihood: which one.
        block_size: S.
        repeats: orders of the multi-order bound.
        time_conditioned: whether the model reads the noise level.
        unnormalized: whether its scores need not sum to one.
    """
    exact = likelihood in ("marginal", "left-to-right", "confidence")
    check(
        not (exact and time_conditioned),
        "likelihood",
        likelihood,
        "nelbo or orders for a time-conditioned model, which has bounds alone",
    )
    check(
        likelihood == "nelbo" or not unnormalized,
        "likelihood",
        likelihood,
        "nelbo where scores need not sum to one",
    )
    check(
        likelihood != "marginal" or block_size <= MAX_MARGINAL_BLOCK,
        "likelihood",
        likelihood,
        f"orders, its upper bound, above block-size = {MAX_MARGINAL_BLOCK} (here {block_size})",
    )
    check(
        likelihood != "orders" or repeats >= 2,
        "repeats",
        repeats,
        "at least 2, so that the error can be estimated",
    )
