"""Block diffusion: autoregressive over blocks, masked diffusion in a block (docs/math.md §5)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import NoiseConfig, ObjectiveConfig, TrainConfig
from bd3lm.data import Batch, Dataset, NoiseSpec
from bd3lm.data.store import TokenArrays
from bd3lm.errors import ConfigError
from bd3lm.model import KVCache, Transformer
from bd3lm.model.head import whole_tiles
from bd3lm.systems.base import Denoiser, System, flat_targets, sigma_of
from bd3lm.systems.learned_noise import rarity_exponents
from bd3lm.systems.sized_noise import SizedNoise, schedule_of
from bd3lm.systems.views import with_complements


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
        objective: ObjectiveConfig | None = None,
        seed: int = 1,
    ) -> None:
        self._cfg = noise or NoiseConfig()
        self._objective = objective or ObjectiveConfig()
        self._time_conditioned, self._seed = time_conditioned, seed
        super().__init__(block_size, mask_id, schedule_of(self._cfg))
        if self._cfg.resample and self._cfg.clip is None and not self._cfg.clip_search:
            raise ConfigError(
                "noise.resample", True, "False without noise.clip or noise.clip-search"
            )
        self.sizes = tuple(dict.fromkeys(self._objective.block_sizes)) or (block_size,)
        self._noises = {
            size: SizedNoise(
                size,
                self._cfg,
                time_conditioned=time_conditioned,
                masks=self._objective.masks_at(size),
            )
            for size in self.sizes
        }

    @classmethod
    def from_config(cls, cfg: TrainConfig, mask_id: int) -> Self:
        """Build the system with the run's block size, noise and objective.

        Raises:
            ConfigError: a clip search for a time-conditioned model.
        """
        if cfg.noise.clip_search and cfg.model.time_conditioning:
            raise ConfigError("noise.clip-search", True, "False with model.time-conditioning")
        return cls(
            cfg.block,
            mask_id,
            cfg.noise,
            time_conditioned=cfg.model.time_conditioning,
            objective=cfg.objective,
            seed=cfg.seed,
        )

    def at(self, size: int) -> BlockDiffusion:
        """This system at one of its block sizes; they share the noise learned for that size."""
        if self.sizes == (size,):
            return self
        objective = self._objective.of_one_size(size)
        told = self._time_conditioned
        alone = BlockDiffusion(
            size, self.mask_id, self._cfg, time_conditioned=told, objective=objective
        )
        alone._noises = {size: self._noises[size]}
        return alone

    def size_of(self, step: int) -> int:
        """S of a step, a function of (seed, step): from a shuffled round, or along the ramp."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        sizes = self._objective.block_sizes
        if self._objective.ramp_steps:
            index = step * len(sizes) // self._objective.ramp_steps
            return sorted(sizes)[index] if index < len(sizes) else self.block_size
        turn, place = divmod(step, len(sizes))
        bits = np.random.Philox(key=[self._seed, turn], counter=[0, 0, 3, 0])
        return int(np.random.Generator(bits).permutation(sizes)[place])

    def noise(self, step: int) -> NoiseSpec:
        """Noise of the settings, with the learned clip, counts and rarity."""
        return self._noises[self.size_of(step)].spec

    def fit_to_data(self, data: Dataset | TokenArrays) -> None:
        """Rank the tokens by rarity, for masking by frequency."""
        if self._cfg.frequency_gap > 0:
            gamma = rarity_exponents(data.token_counts(), self._cfg.frequency_gap)
            for noise in self._noises.values():
                noise.set_rarity(gamma)

    def observations(self) -> Tensor | None:
        """Losses by masked count of this step, if the distribution of counts is fitted."""
        every = (noise.observations for noise in self._noises.values())
        return next((sums for sums in every if sums is not None), None)

    def update_noise_after_step(self, step: int) -> None:
        """Refit the distribution of counts every few steps, if it is fitted."""
        for noise in self._noises.values():
            noise.update_after_step(step)

    @property
    def _own(self) -> SizedNoise:
        return self._noises[self.block_size]

    @property
    def clip(self) -> tuple[float, float] | None:
        """Levels to train on at the system's block size; None: all."""
        return self._own.clip

    def set_clip(self, clip: tuple[float, float] | None) -> None:
        """Restrict noise levels at the system's block size to this clip from the next step on."""
        self._own.set_clip(clip)

    @property
    def count_probs(self) -> NDArray[np.float64] | None:
        """Fitted or uniform q(k) for k = 1..S; None if levels are drawn instead of counts."""
        return self._own.count_probs

    def state(self) -> dict[str, Any]:
        """The clip and the fitted distribution of counts, of every block size."""
        others = {
            str(s): noise.state() for s, noise in self._noises.items() if s != self.block_size
        }
        return self._own.state() | ({"sizes": others} if others else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self._own.load_state(state)
        for size, noise in self._noises.items():
            if size != self.block_size:
                noise.load_state(state["sizes"][str(size)])

    def loss(self, model: Transformer, batch: Batch) -> Tensor:
        """Sum of weight·CE over the masked positions, in nats, and of the weighted AR loss."""
        if batch.step < self._objective.ar_steps:
            return self._ar_loss(model, batch)
        if self._objective.views_at(batch.block_size) > 1:
            weights = self._noises[batch.block_size].complementary_weights(batch.x0.device)
            batch = with_complements(batch, weights, self.mask_id)
        sigma = sigma_of(batch.mask_prob) if model.cfg.time_conditioning else None
        if self._objective.ar_weight:
            return self._joint_loss(model, batch, sigma)
        size = batch.block_size
        select, weight = whole_tiles(batch.masked, batch.weight)
        if size == batch.x0.shape[1]:
            doc_ids, views = batch.doc_ids, len(batch.xt) // len(batch.x0)
            if doc_ids is not None and views > 1:
                doc_ids = doc_ids.repeat(views, 1)
            features = model.encode(
                batch.xt, size, select=_sources(model, select), doc_ids=doc_ids, sigma=sigma
            )
        else:
            features = model.denoise(
                batch.xt, batch.x0, size, select, doc_ids=batch.doc_ids, sigma=sigma
            )
        target = flat_targets(batch.x0, select)
        loss, nats = self.head_loss(model, features, target, weight)
        self._observe(nats, batch)
        if len(self.sizes) > 1:
            self.parts.add(f"loss_S{size}", loss, batch.num_noisable)
        return loss

    def _joint_loss(self, model: Transformer, batch: Batch, sigma: Tensor | None) -> Tensor:
        """Add the next-token loss of the causal clean stream."""
        objective, masked, noisable = self._objective, batch.masked, batch.num_noisable
        chosen, number = batch.noisable.flatten(), noisable
        if objective.ar_tokens == "unmasked":
            chosen = chosen.index_fill(0, masked, False)
            number -= len(masked)
        after = torch.nonzero_static(chosen, size=number).flatten()
        share = objective.ar_weight * noisable / max(number, 1)
        after, ar_weight = whole_tiles(after, torch.full_like(after, share, dtype=torch.float32))
        select, weight = whole_tiles(masked, batch.weight)
        features = model.denoise_and_predict(
            batch.xt,
            batch.x0,
            batch.block_size,
            select,
            after - 1,
            doc_ids=batch.doc_ids,
            sigma=sigma,
        )
        target = flat_targets(batch.x0, torch.cat([select, after]))
        loss, nats = self.head_loss(model, features, target, torch.cat([weight, ar_weight]))
        self._observe(nats, batch)
        of_noised = (nats[: len(masked)] * batch.weight).sum()
        self.parts.add("loss", of_noised, noisable)
        self.parts.add(f"loss_S{batch.block_size}", of_noised, noisable)
        self.parts.add("loss_ar", nats[len(select) :][:number].sum(), number)
        return loss

    def _ar_loss(self, model: Transformer, batch: Batch) -> Tensor:
        """The next-token loss alone, of the clean stream alone."""
        number = batch.num_noisable
        after = torch.nonzero_static(batch.noisable.flatten(), size=number).flatten()
        after, weight = whole_tiles(after, torch.ones_like(after, dtype=torch.float32))
        features = model.encode(batch.x0, 1, select=after - 1, doc_ids=batch.doc_ids)
        loss, _ = self.head_loss(model, features, flat_targets(batch.x0, after), weight)
        self.parts.add("loss_ar", loss, number)
        return loss

    def _observe(self, nats: Tensor, batch: Batch) -> None:
        self._noises[batch.block_size].observe(nats, batch.masked, batch.mask_prob.numel())

    def denoiser(self, model: Transformer, x0: Tensor, doc_ids: Tensor | None) -> Denoiser:
        """Encode the clean stream once; each call then runs one noised stream against its cache."""
        rows, seq_len = x0.shape
        clean: KVCache | None = None
        before: Tensor | None = None
        if self.block_size < seq_len:
            clean = KVCache(model.cfg, rows, seq_len, x0.device)
            read = torch.empty(0, dtype=torch.int64, device=x0.device)
            if model.cfg.token_shift:
                starts = torch.arange(0, rows * seq_len, self.block_size, device=x0.device)
                read = (starts - 1).clamp(min=0)
            before = model.encode(
                x0, self.block_size, select=read, doc_ids=doc_ids, cache=clean, commit=seq_len
            )
            before = before if model.cfg.token_shift else None

        def denoise(xt: Tensor, select: Tensor, mask_prob: Tensor) -> Tensor:
            sigma = sigma_of(mask_prob) if model.cfg.time_conditioning else None
            if clean is None:
                return model.encode(
                    xt,
                    self.block_size,
                    select=_sources(model, select),
                    doc_ids=doc_ids,
                    sigma=sigma,
                )
            return model.denoise_cached(
                xt, clean, self.block_size, select, before=before, doc_ids=doc_ids, sigma=sigma
            )

        return denoise

    def preparing_forwards(self, seq_len: int) -> int:
        """1 for the clean stream; 0 without one."""
        return int(self.block_size < seq_len)


def _sources(model: Transformer, select: Tensor) -> Tensor:
    """Positions of one whole stream whose features predict these; position 0 is never predicted."""
    return select - 1 if model.cfg.token_shift else select
