"""Noise schedules, weightings and masks (MATH §2–4), as computed in Rust."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bd3lm import _core

MIN_LEVEL: float = _core.MIN_LEVEL
"""Lowest noise level t that is drawn (docs/math.md §2)."""


class Schedule:
    """A noise schedule on t in (0, 1] (MATH §2).

    Args:
        name: loglinear, square, square_root, logarithmic, cosine, gaussian or bimodal_gaussian.
        eps: cosine: p(0), in [0, 1).
        mu: gaussian, bimodal_gaussian: mean of the (first) component.
        sigma: its deviation, greater than 0.
        mu2: bimodal_gaussian: mean of the second component.
        sigma2: its deviation, greater than 0.
        mixture: bimodal_gaussian: weight of the first component, in (0, 1).
        paper_weights: bimodal_gaussian: the paper's Eq. 5–7 literally, which counts the NELBO
            twice and has no inverse; training only.

    Raises:
        ConfigError: an unknown name, or a parameter that is missing or out of range.

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
    ) -> None:
        self.name = name
        self._core = _core.Schedule(
            name,
            eps=eps,
            mu=mu,
            sigma=sigma,
            mu2=mu2,
            sigma2=sigma2,
            mixture=mixture,
            paper_weights=paper_weights,
        )

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
    """A reweighting of the training loss (MATH §3); reported likelihoods always use nelbo.

    Args:
        name: nelbo, edm, iddpm, sigmoid, flow_matching or simple.
        k: shift of the sigmoid.

    >>> float(Weighting("sigmoid").at(Schedule("loglinear"), 0.25))
    0.25
    """

    def __init__(self, name: str = "nelbo", *, k: float = 0.0) -> None:
        self.name = name
        self._core = _core.Weighting(name, k=k)

    def at(self, schedule: Schedule, t: ArrayLike) -> NDArray[np.float64]:
        """The factor on top of w(t), at level t of a schedule; same shape as ``t``."""
        return _each(lambda x: self._core.at(schedule._core, x), t)

    def keeps_bound(self, schedule: Schedule) -> bool:
        """Whether the factor does not fall with t, on a fine grid of levels (MATH §3).

        Only then is the weighted loss still a bound of its kind.
        """
        t = np.linspace(MIN_LEVEL, 1.0 - MIN_LEVEL, 2001)
        factor = self.at(schedule, t)
        return bool((np.diff(factor) >= -1e-9 * np.abs(factor[1:])).all())


class NoiseSpec:
    """What to draw for a batch: immutable, and checked when it is made (MATH §2–4).

    Args:
        schedule: p(t) and w(t).
        estimator: ``bernoulli`` (a level a block, independent masks), ``count`` (a masked count a
            block, a uniform subset of that size) or ``full`` (everything masked, weight 1).
        clip: restrict t to U[a, b]; a = 0 means 1e-3, [1, 1] means ``full``.
        resample: bernoulli with a clip: also force each block's masked share into [a, b].
        weighting: of the training loss; None is the NELBO itself.
        gamma: float32 [V]: exponent of each token's mask probability (MATH §6), bernoulli only.
        count_probs: q(k) for k = 1..S of ``count``; None is uniform.
        stratum: ``(j, r)``: draw k of ``count`` from the j-th of r equal shares.
        strata: bernoulli: spread the levels over equal strata of the global batch.
        time_conditioned: the model reads the levels, so ``count`` takes a weighting at the level
            of each block, not its mean given the count (docs/math.md §3).

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
    ) -> None:
        self._core = _core.NoiseSpec(
            schedule._core,
            estimator=estimator,
            clip=clip,
            resample=resample,
            weighting=None if weighting is None else weighting._core,
            gamma=gamma,
            count_probs=count_probs,
            stratum=stratum,
            strata=strata,
            time_conditioned=time_conditioned,
        )

    def check(self, seq_len: int, block_size: int) -> None:
        """Check what depends on the rows.

        Raises:
            ConfigError: S does not divide L, a clip that no k/S fits, or q(k) of another length.
        """
        self._core.check(seq_len, block_size)


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
    """One-dimensional NumPy view of a contiguous CPU tensor; booleans as bytes."""
    view = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    return view.numpy().reshape(-1)


def _each(
    f: Callable[[NDArray[np.float64]], NDArray[np.float64]], x: ArrayLike
) -> NDArray[np.float64]:
    values = np.asarray(x, dtype=np.float64)
    return f(np.ascontiguousarray(values).reshape(-1)).reshape(values.shape)
