"""Block diffusion: autoregressive over blocks, masked diffusion inside a block (MATH §5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bd3lm.config import NoiseConfig
from bd3lm.data import Batch, NoiseSpec, Schedule, Weighting
from bd3lm.model import KVCache, Transformer, head_cross_entropy
from bd3lm.systems.base import Scorer, System, flat_targets


def noise_spec(cfg: NoiseConfig) -> NoiseSpec:
    """The loader's noise for these settings.

    Raises:
        ConfigError: a schedule parameter, clip or combination that MATH §2–4 does not allow.
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
    return NoiseSpec(
        Schedule(cfg.schedule, **params),
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
        self._noise = noise_spec(noise or NoiseConfig())

    def noise(self, step: int) -> NoiseSpec:
        """The same noise at every step."""
        return self._noise

    def loss(self, model: Transformer, batch: Batch) -> Tensor:
        """Σ weight·CE over masked positions, in nats; gradients reach every parameter."""
        sigma = None
        if model.cfg.time_conditioning:
            sigma = -torch.log1p(-batch.mask_prob.clamp(max=1 - 1e-6))
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
        return self._cross_entropy(model, features, target, batch.weight)[0]

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

        def score(xt: Tensor, select: Tensor) -> Tensor:
            if clean is None:
                features = model.encode(xt, self.block_size, select=select, doc_ids=doc_ids)
            else:
                features = model.denoise_cached(xt, clean, self.block_size, select, doc_ids=doc_ids)
            target = flat_targets(x0, select)
            weight = torch.ones_like(target, dtype=torch.float32)
            return self._cross_entropy(model, features, target, weight)[1]

        return score

    def _cross_entropy(
        self, model: Transformer, features: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        head = model.head
        return head_cross_entropy(features, head.weight, head.bias, target, weight, self.mask_id)
