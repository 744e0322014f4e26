"""Likelihood: estimators, and validation during a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bd3lm.config.check import check, check_whole
from bd3lm.config.names import EstimatorName

MAX_EXACT_BLOCK = 4
"""Largest S whose 2^S - 1 masks are all run by the exact estimator."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation during and after training, always with the averaged weights."""

    every: int = 0
    """Steps between quick validations; 0: only at the end."""
    rows: int = 64
    """Rows of a quick validation."""
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
        check_whole("eval.repeats", self.repeats, 1)
        check_whole("eval.batch-size", self.batch_size, 1)
        if self.stride is not None:
            check_whole("eval.stride", self.stride, 1)


def check_estimator(
    estimator: EstimatorName, block_size: int, repeats: int, told: bool, prefix: str = ""
) -> None:
    """Raise :class:`ConfigError` where an estimator does not go with a model or its repeats.

    Args:
        estimator: of the likelihood, not ``auto``.
        block_size: S.
        repeats: forwards of the sampled estimators.
        told: whether the model is told the noise level.
        prefix: of the settings' names in the message.
    """
    check(
        estimator != "exact" or block_size <= MAX_EXACT_BLOCK,
        f"{prefix}estimator",
        estimator,
        f"must be stratified here: exact needs block-size <= {MAX_EXACT_BLOCK}, not {block_size}",
    )
    check(
        estimator != "exact" or not told,
        f"{prefix}estimator",
        estimator,
        "must be stratified: a model with time conditioning has no exact sum",
    )
    check(
        estimator != "stratified" or (repeats >= 2 and repeats % 2 == 0),
        f"{prefix}repeats",
        repeats,
        "must be an even number, at least 2, for stratified",
    )
    check(
        estimator in ("exact", "stratified") or repeats >= 2,
        f"{prefix}repeats",
        repeats,
        "must be at least 2, so that the error can be estimated",
    )
