"""Block diffusion: autoregressive over blocks, masked diffusion inside a block (MATH §5)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import NoiseConfig, TrainConfig
from bd3lm.data import Batch, NoiseSpec, Schedule, Weighting
from bd3lm.model import KVCache, Transformer, head_cross_entropy
from bd3lm.systems.base import Scorer, System, flat_targets, sigma_of


def schedule_of(cfg: NoiseConfig) -> Schedule:
    """The noise schedule of these settings.

    Raises:
        ConfigError: a parameter out of range.
    """
    params: dict[str, Any] = {}
    if cfg.schedule == "gaussian":
        params = {"mu": cfg.mu, "sigma": cfg.sigma}
    elif cfg.schedule == "bimodal_gaussian":
        params = {
            "mu": cfg.mu,
            "sigma": cfg.sigma,
            "mu2": cfg.mu2,
            "sigma2": cfg.sigma2,
            "mixture": cfg.mixture,
        }
    return Schedule(cfg.schedule, **params)


def noise_spec(cfg: NoiseConfig) -> NoiseSpec:
    """The loader's noise for these settings.

    Raises:
        ConfigError: a schedule parameter, clip or combination that MATH §2–4 does not allow.
    """
    return NoiseSpec(
        schedule_of(cfg),
        estimator=cfg.estimator,
        clip=cfg.clip,
        resample=cfg.resample,
        weighting=Weighting(cfg.weighting, k=cfg.weighting_k),
    )


class BlockDiffusion(System):
    """BD3-LM for any S dividing L.

    A noised block sees itself and the clean blocks before it. With S = L there is no block
    before it, so the clean stream is left out and this is MDLM without time conditioning.
    """

    name = "bd3lm"

    def __init__(self, block_size: int, mask_id: int, noise: NoiseConfig | None = None) -> None:
        super().__init__(block_size, mask_id)
        self._schedule = schedule_of(noise or NoiseConfig())
        self._noise = noise_spec(noise or NoiseConfig())

    @classmethod
    def from_config(cls, cfg: TrainConfig, mask_id: int) -> Self:
        """With the run's block size and noise."""
        return cls(cfg.block, mask_id, cfg.noise)

    def noise(self, step: int) -> NoiseSpec:
        """The same noise at every step."""
        return self._noise

    def loss(self, model: Transformer, batch: Batch) -> Tensor:
        """Σ weight·CE over masked positions, in nats; gradients reach every parameter."""
        sigma = sigma_of(batch.mask_prob) if model.cfg.time_conditioning else None
        if self.block_size == batch.x0.shape[1]:
            features = model.encode(
                batch.xt,
                self.block_size,
                select=batch.masked,
                doc_ids=batch.doc_ids,
                sigma=sigma,
            )
        else:
            features = model.denoise(
                batch.xt,
                batch.x0,
                self.block_size,
                batch.masked,
                doc_ids=batch.doc_ids,
                sigma=sigma,
            )
        target = flat_targets(batch.x0, batch.masked)
        return self.head_loss(model, features, target, batch.weight)[0]

    def scorer(self, model: Transformer, x0: Tensor, doc_ids: Tensor | None) -> Scorer:
        """Run the clean stream once; each call then runs one noised version against it."""
        rows, seq_len = x0.shape
        clean: KVCache | None = None
        if self.block_size < seq_len:
            clean = KVCache(model.cfg, rows, seq_len, x0.device)
            nothing = torch.empty(0, dtype=torch.int64, device=x0.device)
            model.encode(
                x0, self.block_size, select=nothing, doc_ids=doc_ids, cache=clean, commit=seq_len
            )

        def score(xt: Tensor, select: Tensor, mask_prob: Tensor) -> Tensor:
            sigma = sigma_of(mask_prob) if model.cfg.time_conditioning else None
            if clean is None:
                features = model.encode(
                    xt, self.block_size, select=select, doc_ids=doc_ids, sigma=sigma
                )
            else:
                features = model.denoise_cached(
                    xt, clean, self.block_size, select, doc_ids=doc_ids, sigma=sigma
                )
            target = flat_targets(x0, select)
            weight = torch.ones_like(target, dtype=torch.float32)
            return self.head_loss(model, features, target, weight)[1]

        return score

    def preparing_forwards(self, seq_len: int) -> int:
        """The clean stream's one, where there is a clean stream."""
        return int(self.block_size < seq_len)

    def level_grid(self, steps: int) -> NDArray[np.float64]:
        """The schedule's levels at t_i = 1 - i/N, with p(t_N) = 0 (MATH §8)."""
        grid = self._schedule.mask_prob(np.linspace(1.0, 0.0, steps + 1)[:-1])
        return np.append(grid, 0.0)

    def head_loss(
        self, model: Transformer, features: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Σ weight·CE and every position's CE, from features [M, D]."""
        head = model.head
        return head_cross_entropy(features, head.weight, head.bias, target, weight, self.mask_id)
