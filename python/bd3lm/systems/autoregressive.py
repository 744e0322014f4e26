"""Autoregression: predict every token from those before it (docs/math.md §5)."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from bd3lm.config import NoiseConfig, TrainConfig, check
from bd3lm.data import Batch, NoiseSpec
from bd3lm.model import Transformer
from bd3lm.model.head import whole_tiles
from bd3lm.systems.base import Denoiser, System, flat_targets


class Autoregressive(System):
    """Causal language model on the same Transformer; its score is the exact likelihood.

    Position i predicts token i+1. A BD3-LM with S = 1 predicts token i from a mask at position i,
    so the two are different functions of the same weights. The mask token has probability zero.
    There is no noise: the masked positions of a batch are the positions to predict.
    """

    name = "ar"
    prediction_offset = 1

    def __init__(self, mask_id: int) -> None:
        super().__init__(1, mask_id)
        self._all = NoiseSpec(self.schedule, estimator="full")

    @classmethod
    def from_config(cls, cfg: TrainConfig, mask_id: int) -> Self:
        """Build the system; noise settings must keep their defaults.

        Raises:
            ConfigError: time conditioning, or noise that would never be used.
        """
        conditioned = cfg.model.time_conditioning
        allowed = "False for system = ar, which has no noise level"
        check(not conditioned, "model.time-conditioning", conditioned, allowed)
        for name, default in vars(NoiseConfig()).items():
            value = getattr(cfg.noise, name)
            field = f"noise.{name.replace('_', '-')}"
            check(
                value == default, field, value, f"{default} for system = ar, which draws no noise"
            )
        return cls(mask_id)

    def noise(self, step: int) -> NoiseSpec:
        """Mask every scored position, with weight 1."""
        return self._all

    def loss(self, model: Transformer, batch: Batch) -> Tensor:
        """Sum of the next-token cross-entropy, in nats."""
        select, weight = whole_tiles(batch.masked, batch.weight)
        features = self._features(model, batch.x0, select, batch.doc_ids)
        return self.head_loss(model, features, flat_targets(batch.x0, select), weight)[0]

    def denoiser(self, model: Transformer, x0: Tensor, doc_ids: Tensor | None) -> Denoiser:
        """Run one causal forward a call; the mask and its level are not read."""

        def denoise(xt: Tensor, select: Tensor, mask_prob: Tensor) -> Tensor:
            return self._features(model, x0, select, doc_ids)

        return denoise

    def _features(
        self, model: Transformer, x0: Tensor, select: Tensor, doc_ids: Tensor | None
    ) -> Tensor:
        """Features that predict the selected positions: those of the positions before.

        Position 0 of a row or a document is a BOS and never selected.
        """
        return model.encode(x0, 1, select=select - self.prediction_offset, doc_ids=doc_ids)
