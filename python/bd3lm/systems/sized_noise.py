"""Noise of blocks of one size: its settings, and the noise that training has learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import NoiseConfig
from bd3lm.data import NoiseSpec, Schedule, Weighting
from bd3lm.systems.learned_noise import CountDistribution


def schedule_of(cfg: NoiseConfig, *, training: bool = False) -> Schedule:
    """Build the noise schedule of these settings.

    Args:
        cfg: the settings.
        training: apply ``paper_weights``. Likelihoods and samplers leave it out: they need the
            exact weight and an inverse.

    Raises:
        ConfigError: a parameter out of range.
    """
    assert not isinstance(cfg.schedule_table, str), "NoiseConfig reads the file"
    return Schedule(
        cfg.schedule,
        mu=cfg.mu,
        sigma=cfg.sigma,
        mu2=cfg.mu2,
        sigma2=cfg.sigma2,
        mixture=cfg.mixture,
        paper_weights=cfg.paper_weights and training,
        points=cfg.schedule_table,
    )


def noise_spec(
    cfg: NoiseConfig,
    clip: tuple[float, float] | None,
    *,
    count_probs: list[float] | None = None,
    gamma: NDArray[np.float32] | None = None,
    time_conditioned: bool = False,
    block_size: int | None = None,
    masks: int = 1,
) -> NoiseSpec:
    """Build the loader's noise from the settings and the noise that training has learned.

    Args:
        cfg: the settings.
        clip: levels to train on.
        count_probs: fitted q(k).
        gamma: exponents of masking by frequency.
        time_conditioned: whether the model reads the noise level.
        block_size: S; None: that of the rows.
        masks: drawn for each row.

    Raises:
        ConfigError: a schedule parameter, clip or combination outside docs/math.md §2–4.
    """
    return NoiseSpec(
        schedule_of(cfg, training=True),
        estimator=cfg.estimator,
        clip=clip,
        resample=cfg.resample and clip is not None,
        weighting=Weighting(cfg.weighting, k=cfg.weighting_k),
        count_probs=count_probs,
        gamma=gamma,
        time_conditioned=time_conditioned,
        block_size=block_size,
        masks=masks,
    )


class SizedNoise:
    """Noise of blocks of S tokens.

    Args:
        block_size: S.
        cfg: the settings.
        time_conditioned: whether the model reads the noise level.
        masks: drawn for each row of a step.

    Attributes:
        clip: levels to train on; None: all.
        spec: the noise of the next step.
    """

    def __init__(
        self, block_size: int, cfg: NoiseConfig, *, time_conditioned: bool, masks: int = 1
    ) -> None:
        self.block_size, self.clip, self._masks = block_size, cfg.clip, masks
        self._cfg, self._time_conditioned = cfg, time_conditioned
        self._gamma: NDArray[np.float32] | None = None
        self._counts = CountDistribution(block_size) if cfg.fit_counts else None
        self.spec = self._make()

    def _make(self) -> NoiseSpec:
        self._complementary: Tensor | None = None
        return noise_spec(
            self._cfg,
            self.clip,
            count_probs=None if self._counts is None else self._counts.probs,
            gamma=self._gamma,
            time_conditioned=self._time_conditioned,
            block_size=self.block_size,
            masks=self._masks,
        )

    def complementary_weights(self, device: torch.device) -> Tensor:
        """Loss weights of complementary views (:func:`with_complements`), float32 [S+1, S+1]."""
        if self._complementary is None or self._complementary.device != device:
            table = self.spec.complementary_weights(self.block_size)
            self._complementary = torch.from_numpy(table).to(device)
        return self._complementary

    def set_rarity(self, gamma: NDArray[np.float32]) -> None:
        """Mask by frequency with these exponents [V]."""
        self._gamma = gamma
        self.spec = self._make()

    def set_clip(self, clip: tuple[float, float] | None) -> None:
        """Restrict noise levels to this clip from the next step on."""
        self.clip = clip
        self.spec = self._make()

    def observe(self, nats: Tensor, masked: Tensor, blocks: int) -> None:
        """Show the losses of a step to the distribution of counts, if it is fitted."""
        if self._counts is not None:
            self._counts.observe(nats[: len(masked)], masked, blocks)

    @property
    def observations(self) -> Tensor | None:
        """Losses by masked count of this step; None if there are none."""
        return None if self._counts is None else self._counts.observed

    def update_after_step(self, step: int) -> None:
        """Refit the distribution of counts every few steps, if it is fitted."""
        if self._counts is not None and self._counts.update_noise_after_step(step):
            self.spec = self._make()

    @property
    def count_probs(self) -> NDArray[np.float64] | None:
        """Fitted or uniform q(k) for k = 1..S; None if levels are drawn instead of counts."""
        if self._cfg.estimator != "count":
            return None
        if self._counts is not None and self._counts.probs is not None:
            return np.array(self._counts.probs)
        return np.full(self.block_size, 1.0 / self.block_size)

    def state(self) -> dict[str, Any]:
        """The clip and the fitted distribution of counts."""
        return {"clip": self.clip, "counts": None if self._counts is None else self._counts.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.clip = None if state["clip"] is None else tuple(state["clip"])
        if self._counts is not None:
            self._counts.load_state(state["counts"])
        self.spec = self._make()
