"""Block diffusion: autoregressive over blocks, masked diffusion in a block (docs/math.md §5)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import NoiseConfig, TrainConfig
from bd3lm.data import Batch, Dataset, NoiseSpec, Schedule, Weighting
from bd3lm.data.store import TokenArrays
from bd3lm.errors import ConfigError
from bd3lm.model import KVCache, Transformer
from bd3lm.systems.base import Denoiser, System, flat_targets, sigma_of, whole_tiles
from bd3lm.systems.learned_noise import CountDistribution, rarity_exponents


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
) -> NoiseSpec:
    """Build the loader's noise from the settings and from what training has learned.

    Args:
        cfg: the settings.
        clip: levels to train on.
        count_probs: fitted q(k).
        gamma: exponents of masking by frequency.
        time_conditioned: whether the model reads the noise level.

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
    )


class BlockDiffusion(System):
    """BD3-LM for any S that divides L.

    A noised block sees itself and the clean blocks before it. With S = L there are none, so the
    clean stream is left out and the model is an MDLM.
    """

    name = "bd3lm"

    def __init__(
        self,
        block_size: int,
        mask_id: int,
        noise: NoiseConfig | None = None,
        *,
        time_conditioned: bool = False,
    ) -> None:
        self._cfg = noise or NoiseConfig()
        self._time_conditioned = time_conditioned
        super().__init__(block_size, mask_id, schedule_of(self._cfg))
        if self._cfg.resample and self._cfg.clip is None and not self._cfg.clip_search:
            raise ConfigError(
                "noise.resample", True, "False without noise.clip or noise.clip-search"
            )
        self.clip = self._cfg.clip
        self._gamma: NDArray[np.float32] | None = None
        self._counts = CountDistribution(block_size) if self._cfg.fit_counts else None
        self._renew()

    @classmethod
    def from_config(cls, cfg: TrainConfig, mask_id: int) -> Self:
        """Build the system with the run's block size and noise.

        Raises:
            ConfigError: a clip search for a model that is told the noise level.
        """
        if cfg.noise.clip_search and cfg.model.time_conditioning:
            raise ConfigError("noise.clip-search", True, "False with model.time-conditioning")
        return cls(cfg.block, mask_id, cfg.noise, time_conditioned=cfg.model.time_conditioning)

    def noise(self, step: int) -> NoiseSpec:
        """Noise of the settings, with the learned clip, counts and rarity."""
        return self._noise

    def _renew(self) -> None:
        probs = None if self._counts is None else self._counts.probs
        self._noise = noise_spec(
            self._cfg,
            self.clip,
            count_probs=probs,
            gamma=self._gamma,
            time_conditioned=self._time_conditioned,
        )

    def fit_to_data(self, data: Dataset | TokenArrays) -> None:
        """Rank the tokens by rarity, for masking by frequency."""
        if self._cfg.frequency_gap > 0:
            self._gamma = rarity_exponents(data.token_counts(), self._cfg.frequency_gap)
            self._renew()

    def observations(self) -> Tensor | None:
        """Losses by masked count of this step, if the distribution of counts is fitted."""
        return None if self._counts is None else self._counts.observed

    def update_noise_after_step(self, step: int) -> None:
        """Refit the distribution of counts every few steps, if it is fitted."""
        if self._counts is not None and self._counts.update_noise_after_step(step):
            self._renew()

    def set_clip(self, clip: tuple[float, float] | None) -> None:
        """Restrict noise levels to this clip from the next step on."""
        self.clip = clip
        self._renew()

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
        counts = None if self._counts is None else self._counts.state()
        return {"clip": self.clip, "counts": counts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.clip = None if state["clip"] is None else tuple(state["clip"])
        if self._counts is not None:
            self._counts.load_state(state["counts"])
        self._renew()

    def loss(self, model: Transformer, batch: Batch) -> Tensor:
        """Sum of weight·CE over the masked positions, in nats."""
        sigma = sigma_of(batch.mask_prob) if model.cfg.time_conditioning else None
        select, weight = whole_tiles(batch)
        if self.block_size == batch.x0.shape[1]:
            features = model.encode(
                batch.xt, self.block_size, select=select, doc_ids=batch.doc_ids, sigma=sigma
            )
        else:
            features = model.denoise(
                batch.xt, batch.x0, self.block_size, select, doc_ids=batch.doc_ids, sigma=sigma
            )
        target = flat_targets(batch.x0, select)
        loss, nats = self.head_loss(model, features, target, weight)
        if self._counts is not None:
            masked = batch.masked
            self._counts.observe(nats[: len(masked)], masked, batch.mask_prob.numel())
        return loss

    def denoiser(self, model: Transformer, x0: Tensor, doc_ids: Tensor | None) -> Denoiser:
        """Encode the clean stream once; each call then runs one noised stream against its cache."""
        rows, seq_len = x0.shape
        clean: KVCache | None = None
        if self.block_size < seq_len:
            clean = KVCache(model.cfg, rows, seq_len, x0.device)
            nothing = torch.empty(0, dtype=torch.int64, device=x0.device)
            model.encode(
                x0, self.block_size, select=nothing, doc_ids=doc_ids, cache=clean, commit=seq_len
            )

        def denoise(xt: Tensor, select: Tensor, mask_prob: Tensor) -> Tensor:
            sigma = sigma_of(mask_prob) if model.cfg.time_conditioning else None
            if clean is None:
                return model.encode(
                    xt, self.block_size, select=select, doc_ids=doc_ids, sigma=sigma
                )
            return model.denoise_cached(
                xt, clean, self.block_size, select, doc_ids=doc_ids, sigma=sigma
            )

        return denoise

    def preparing_forwards(self, seq_len: int) -> int:
        """1 for the clean stream; 0 without one."""
        return int(self.block_size < seq_len)
