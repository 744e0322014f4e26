"""Noise schedules, weightings and masks (docs/math.md §2–4), as computed in Rust."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bd3lm import _core
from bd3lm.errors import ConfigError

MIN_LEVEL: float = _core.MIN_LEVEL
"""Lowest noise level t that is drawn (docs/math.md §2)."""
SCHEDULES: tuple[str, ...] = tuple(_core.names("schedule"))
"""Names of all schedules."""
WEIGHTINGS: tuple[str, ...] = tuple(_core.names("weighting"))
"""Names of all weightings."""

_TABLE_SIZE = 513
"""Levels at which a callable is tabulated, even in log(t / (1 - t))."""
_FIRST_LEVEL, _LAST_GAP = 1e-4, 1e-8
"""The first of these levels, and one minus the last."""
_RESOLUTION = 1e-13
"""Values nearer than this are taken as equal: float64 keeps no slope between them."""


class Schedule:
    """A noise schedule on t in (0, 1] (docs/math.md §2).

    Args:
        name: one of :data:`bd3lm.config.names.ScheduleName`, such as ``loglinear`` or ``cosine``.
        eps: cosine: p(0), in [0, 1).
        mu: gaussian, bimodal_gaussian: mean of the (first) component.
        sigma: its standard deviation, greater than 0.
        mu2: bimodal_gaussian: mean of the second component.
        sigma2: its standard deviation, greater than 0.
        mixture: bimodal_gaussian: weight of the first component, in (0, 1).
        paper_weights: bimodal_gaussian: Eq. 5–7 of the reproduction as printed, which count the
            NELBO twice and have no inverse; training only.
        points: table: pairs (t, p), see :meth:`table`.

    Raises:
        ConfigError: an unknown name, or a parameter that is missing or out of range.

    Examples:
        >>> float(Schedule("square").mask_prob(0.5))
        0.25
    """

    def __init__(
        self,
        name: str,
        *,
        eps: float = 1e-3,
        mu: float | None = None,
        sigma: float | None = None,
        mu2: float | None = None,
        sigma2: float | None = None,
        mixture: float | None = None,
        paper_weights: bool = False,
        points: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        self.name = name
        self.points = None if points is None else tuple((float(t), float(p)) for t, p in points)
        """Pairs (t, p) of a table, as ``noise.schedule_table`` of the settings takes them."""
        self.settings = {
            "name": name,
            "eps": eps,
            "mu": mu,
            "sigma": sigma,
            "mu2": mu2,
            "sigma2": sigma2,
            "mixture": mixture,
            "paper_weights": paper_weights,
            "points": self.points,
        }
        """The settings as the core reads them."""
        self._core = _core.Schedule(self.settings)

    @classmethod
    def table(cls, t: ArrayLike, p: ArrayLike) -> Schedule:
        """Interpolate points of p(t).

        A monotone cubic interpolates log(p - p(0)) over log t; w is the exact slope of that p, so
        the bound holds between the points too. Put points where p bends.

        Args:
            t: levels, strictly increasing from 0 to 1.
            p: mask probabilities, strictly increasing, p(1) = 1. With p(0) > 0 the bound misses
                the mass below p(0), as it does under cosine; a warning says so.

        Raises:
            ConfigError: points that are no such table.

        Examples:
            >>> round(float(Schedule.table([0, 0.5, 1], [0, 0.25, 1]).loss_weight(0.1)), 9)
            20.0
        """
        levels = np.asarray(t, dtype=np.float64).reshape(-1).tolist()
        values = np.asarray(p, dtype=np.float64).reshape(-1).tolist()
        if len(levels) != len(values):
            raise ConfigError(
                "p", f"{len(values)} numbers", f"as many as the {len(levels)} levels t"
            )
        schedule = cls("table", points=list(zip(levels, values, strict=True)))
        if values[0] > _RESOLUTION:
            warnings.warn(
                f"p(0) = {values[0]:g}: the bound misses the probability mass below it",
                stacklevel=2,
            )
        return schedule

    @classmethod
    def from_callable(cls, p: Callable[[float], float]) -> Schedule:
        """Tabulate p(t) at 513 levels, dense near both ends.

        For p as smooth as the built-in schedules, p agrees to 1e-6 and w to 1e-4, relative, on
        [1e-3, 1); a power of t agrees to 1e-7.

        Args:
            p: a function of t in [0, 1], strictly increasing, p(1) = 1; see :meth:`table`.

        Raises:
            ConfigError: a function that is no such schedule.

        Examples:
            >>> round(float(Schedule.from_callable(lambda t: t**3).loss_weight(0.1)), 6)
            30.0
        """
        odds = np.linspace(np.log(_FIRST_LEVEL), -np.log(_LAST_GAP), _TABLE_SIZE)
        points = [(0.0, float(p(0.0)))]
        for t in (1.0 / (1.0 + np.exp(-odds))).tolist():
            value = float(p(t))
            if not math.isfinite(value):
                raise ConfigError("p", f"{value} at t = {t:.4g}", "a finite number")
            before, level = points[-1][1], points[-1][0]
            if abs(value - before) > _RESOLUTION * abs(value):
                points.append((t, value))
            elif level > 0.01 and t < 0.99 and t - level > 0.02:
                flat = f"{value:.4g} from t = {level:.3g} to {t:.3g}"
                raise ConfigError("p", flat, "strictly increasing")
        last = float(p(1.0))
        if last > 1.0 + 1e-9:
            raise ConfigError("p", f"{last:.6g} at t = 1", "1 there")
        while len(points) > 1 and abs(last - points[-1][1]) <= _RESOLUTION:
            points.pop()
        return cls.table(*zip(*points, (1.0, last), strict=True))

    def mask_prob(self, t: ArrayLike) -> NDArray[np.float64]:
        """p(t): probability that a token is masked at level t; same shape as ``t``."""
        return _each(self._core.mask_prob, t)

    def loss_weight(self, t: ArrayLike) -> NDArray[np.float64]:
        """w(t) = p'(t)/p(t) >= 0: NELBO weight of a masked token; same shape as ``t``."""
        return _each(self._core.loss_weight, t)

    def loss_weight_at(self, p: ArrayLike) -> NDArray[np.float64]:
        """W at the level where tokens are masked with probability p; same shape as ``p``."""
        return _each(self._core.loss_weight_at, p)

    def inverse(self, p: ArrayLike) -> NDArray[np.float64]:
        """t(p): the level at which tokens are masked with probability p; same shape as ``p``."""
        return _each(self._core.inverse, p)


class Weighting:
    """A reweighting of the training loss (docs/math.md §3); reported likelihoods always use nelbo.

    Args:
        name: nelbo, edm, iddpm, sigmoid, flow_matching or simple.
        k: shift of the sigmoid.

    Examples:
        >>> float(Weighting("sigmoid").at(Schedule("loglinear"), 0.25))
        0.25
    """

    def __init__(self, name: str = "nelbo", *, k: float = 0.0) -> None:
        self.name, self.k = name, k
        self._core = _core.Weighting(name, k)

    def at(self, schedule: Schedule, t: ArrayLike) -> NDArray[np.float64]:
        """The factor on top of w(t), at level t of a schedule; same shape as ``t``."""
        return _each(lambda x: self._core.at(schedule._core, x), t)

    def keeps_bound(self, schedule: Schedule) -> bool:
        """Return whether the factor never falls with t, on a fine grid (docs/math.md §3).

        Only then is the weighted loss still a bound of its kind.
        """
        t = np.linspace(MIN_LEVEL, 1.0 - MIN_LEVEL, 2001)
        factor = self.at(schedule, t)
        return bool((np.diff(factor) >= -1e-9 * np.abs(factor[1:])).all())


class NoiseSpec:
    """The noise of a batch: immutable, and checked when it is made (docs/math.md §2–4).

    Args:
        schedule: p(t) and w(t).
        estimator: ``bernoulli`` (a level a block, independent masks), ``count`` (a masked count a
            block, a uniform subset of that size) or ``full`` (everything masked, weight 1).
        clip: restrict t to U[a, b]; a = 0 means 1e-3, [1, 1] means ``full``.
        resample: bernoulli with a clip: also force each block's masked share into [a, b].
        weighting: of the training loss; None is the NELBO itself.
        gamma: float32 [V]: exponent of each token's mask probability (docs/math.md §6), for
            bernoulli only.
        count_probs: q(k) for k = 1..S of ``count``; None is uniform.
        stratum: ``(j, r)``: draw k of ``count`` from the j-th of r equal shares.
        strata: bernoulli: spread the levels over equal strata of the global batch.
        time_conditioned: the model reads the levels, so ``count`` takes a weighting at the level
            of each block, not its mean given the count (docs/math.md §3).
        block_size: S of the blocks to noise; None: that of the rows.
        masks: drawn for each row of a batch.

    Raises:
        ConfigError: values or combinations that are not allowed; the message names them.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        estimator: str = "bernoulli",
        clip: tuple[float, float] | None = None,
        resample: bool = False,
        weighting: Weighting | None = None,
        gamma: NDArray[np.float32] | None = None,
        count_probs: list[float] | None = None,
        stratum: tuple[int, int] | None = None,
        strata: bool = True,
        time_conditioned: bool = False,
        block_size: int | None = None,
        masks: int = 1,
    ) -> None:
        self.block_size, self.masks = block_size, masks
        weighting = weighting or Weighting()
        settings = {
            "schedule": schedule.settings,
            "estimator": estimator,
            "clip": clip,
            "resample": resample,
            "weighting": weighting.name,
            "weighting_k": weighting.k,
            "count_probs": count_probs,
            "stratum": stratum,
            "strata": strata,
            "time_conditioned": time_conditioned,
        }
        self._core = _core.NoiseSpec(settings, gamma)

    def check(self, seq_len: int, block_size: int) -> None:
        """Check the settings that depend on the rows.

        Raises:
            ConfigError: S does not divide L, a clip that no k/S fits, or q(k) of another length.
        """
        self._core.check(seq_len, block_size)

    def complementary_weights(self, block_size: int) -> NDArray[np.float32]:
        """Loss weights of tokens that are noised twice, by a subset and by its complement.

        Entry [n, j] belongs to a block with n noisable tokens of which a view masks j. The sum of
        both views is an unbiased estimate, as that of one view (docs/math.md §5).

        Args:
            block_size: S.

        Returns:
            float32 [S+1, S+1]; zero where nothing is masked.

        Raises:
            ConfigError: an estimator other than ``count``, or a weighting at levels.
        """
        table = np.zeros((block_size + 1, block_size + 1), dtype=np.float32)
        for n in range(1, block_size + 1):
            table[n, 1 : n + 1] = self._core.complementary_weights(n)
        return table


def draw_noise(
    spec: NoiseSpec,
    x0: Tensor,
    noisable: Tensor,
    block_size: int,
    *,
    seed: int,
    step: int,
    first_row: int = 0,
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise rows that are already there; a function of (seed, step, row number) alone.

    Args:
        spec: what to draw.
        x0: clean ids, int64 [B, L], on the CPU.
        noisable: bool [B, L].
        block_size: S, dividing L.
        seed: of the run.
        step: of the run.
        first_row: number of the first row in the global batch.
        num_rows: rows of the global batch, over which strata are laid; None: ``first_row + B``.

    Returns:
        ``(mask, mask_prob, weight)``: bool [B, L]; level p of each block, float32 [B, K]; loss
        weight of each block's masked tokens, float32 [B, K].
    """
    rows, seq_len = x0.shape
    blocks = seq_len // max(block_size, 1)
    mask, mask_out = buffer((rows, seq_len), np.bool_)
    mask_prob, mask_prob_out = buffer((rows, blocks), np.float32)
    weight, weight_out = buffer((rows, blocks), np.float32)
    _core.noise(
        spec._core,
        (seed, step, first_row, num_rows or first_row + rows),
        seq_len,
        block_size,
        flat(x0.contiguous()),
        flat(noisable.contiguous()),
        mask_out,
        mask_prob_out,
        weight_out,
    )
    return mask, mask_prob, weight


def buffer(
    shape: tuple[int, ...], dtype: type[np.generic], *, pinned: bool = False
) -> tuple[Tensor, NDArray[Any]]:
    """A new CPU tensor, not initialised, and the flat view of it that Rust fills.

    Unless it is to be page-locked, NumPy allocates it, in a fraction of the time PyTorch takes.
    """
    array = np.empty(0 if pinned else shape, dtype)
    tensor = torch.from_numpy(array)
    if pinned:
        tensor = torch.empty(shape, dtype=tensor.dtype, pin_memory=True)
        return tensor, flat(tensor)
    view = array.view(np.uint8) if dtype is np.bool_ else array
    return tensor, view.reshape(-1)


def flat(tensor: Tensor) -> NDArray[Any]:
    """View as one-dimensional NumPy array of a contiguous CPU tensor; booleans as bytes."""
    view = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    return view.numpy().reshape(-1)


def _each(
    f: Callable[[NDArray[np.float64]], NDArray[np.float64]], x: ArrayLike
) -> NDArray[np.float64]:
    values = np.asarray(x, dtype=np.float64)
    return f(np.ascontiguousarray(values).reshape(-1)).reshape(values.shape)
