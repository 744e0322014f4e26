"""Noise of the training batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bd3lm.config.check import check, check_number
from bd3lm.config.names import ScheduleName, WeightingName
from bd3lm.errors import ConfigError


@dataclass(frozen=True)
class NoiseConfig:
    """Noise of training batches: schedule, estimator and weighting of the loss."""

    estimator: Literal["count", "bernoulli", "full"] = "count"
    """count: draw the number of masked tokens of each block, for least variance; bernoulli: draw a
    noise level and independent masks, as the BD3-LM paper does; full: mask every token."""
    schedule: ScheduleName = "loglinear"
    """Mask probability p(t). `count` without a clip is the same for every schedule, unless the
    weighting is simple."""
    clip: tuple[float, float] | None = None
    """Restrict t to U[a, b]: a training objective, never a likelihood."""
    resample: bool = False
    """bernoulli with a clip: also force each block's masked fraction into [a, b]."""
    mu: float = 0.5
    """gaussian, bimodal_gaussian: mean of the (first) component."""
    sigma: float = 0.2
    """gaussian, bimodal_gaussian: standard deviation of the (first) component."""
    mu2: float = 0.8
    """bimodal_gaussian: mean of the second component."""
    sigma2: float = 0.2
    """bimodal_gaussian: standard deviation of the second component."""
    mixture: float = 0.6
    """bimodal_gaussian: weight of the first component."""
    schedule_table: str | tuple[tuple[float, float], ...] | None = None
    """table: pairs (t, p) of p(t), increasing from (0, 0) to (1, 1); or a .json or .npy file that
    holds them."""
    paper_weights: bool = False
    """bimodal_gaussian: use Eq. 5-7 of the reproduction as printed, which count the bound twice.
    Only for training with bernoulli and without a clip."""
    clip_search: bool = False
    """At each validation, switch to the clip with the lowest variance of the NELBO between
    blocks."""
    fit_counts: bool = False
    """count: fit the distribution of masked counts to the training losses, for least variance."""
    frequency_gap: float = 0.0
    """bernoulli: mask rare tokens more often. The exponent of the mask probability falls from
    1 + gap for the commonest to 1 - gap for the rarest token of the training data. 0: off."""
    weighting: WeightingName = "nelbo"
    """Loss reweighting while training; likelihoods always use nelbo."""
    weighting_k: float = 0.0
    """Shift k of the sigmoid weighting."""

    def __post_init__(self) -> None:
        for name in ("mu", "mu2"):
            check_number(f"noise.{name}", getattr(self, name), -100, 100)
        for name in ("sigma", "sigma2"):
            check_number(f"noise.{name}", getattr(self, name), 0, 100, interval="(]")
        check_number("noise.mixture", self.mixture, 0, 1, interval="()")
        check_number("noise.weighting-k", self.weighting_k, -100, 100)
        if self.clip is not None:
            low, high = self.clip
            check(0 <= low <= high <= 1, "noise.clip", self.clip, "two levels, 0 <= a <= b <= 1")
        if isinstance(self.schedule_table, str):
            object.__setattr__(self, "schedule_table", read_table(self.schedule_table))
        check(
            self.schedule != "table" or self.schedule_table is not None,
            "noise.schedule-table",
            None,
            "the points (t, p) of noise.schedule = table",
        )
        check(
            self.estimator != "full"
            or (self.clip is None and not self.clip_search and self.weighting == "nelbo"),
            "noise.estimator",
            "full",
            "bernoulli or count with a clip or a weighting: full masks all, with weight 1",
        )
        check(
            not self.resample or self.estimator == "bernoulli",
            "noise.resample",
            self.resample,
            "False unless noise.estimator = bernoulli",
        )
        gap = self.frequency_gap
        check_number("noise.frequency-gap", gap, 0, 1, interval="[)")
        check(
            gap == 0 or (self.estimator == "bernoulli" and not self.resample),
            "noise.frequency-gap",
            gap,
            "0 unless noise.estimator = bernoulli and noise.resample = False",
        )
        check(
            not self.fit_counts or self.estimator == "count",
            "noise.fit-counts",
            self.fit_counts,
            "False unless noise.estimator = count",
        )
        check(
            not self.paper_weights or self.schedule == "bimodal_gaussian",
            "noise.paper-weights",
            self.paper_weights,
            "False unless noise.schedule = bimodal_gaussian",
        )
        check(
            not self.paper_weights or not self.clip_search,
            "noise.clip-search",
            self.clip_search,
            "False with noise.paper-weights, whose p(t) has no inverse",
        )
        check(
            not self.clip_search or gap == 0,
            "noise.clip-search",
            self.clip_search,
            "False with noise.frequency-gap > 0: use a fixed clip",
        )


def read_table(path: str) -> tuple[tuple[float, float], ...]:
    """Read pairs (t, p) from a .json or .npy file: a list of pairs, or an array [N, 2].

    Raises:
        ConfigError: a file that is missing or holds something else.
    """
    try:
        if path.endswith(".npy"):
            import numpy as np

            pairs = np.load(path, allow_pickle=False).tolist()
        else:
            pairs = json.loads(Path(path).read_text(encoding="utf-8"))
        return tuple((float(t), float(p)) for t, p in pairs)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "noise.schedule-table", path, f"a .json or .npy file of pairs (t, p) ({error})"
        ) from None
