"""Autoregression: every token from those before it (MATH §5)."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from bd3lm.config import NoiseConfig, TrainConfig, check
from bd3lm.data import Batch, NoiseSpec
from bd3lm.model import Transformer
from bd3lm.systems.base import Denoiser, System, flat_targets, whole_tiles


class Autoregressive(System):
    """A causal language model on the same Transformer: its score is the exact likelihood.

    Position i predicts token i+1, where a BD3-LM with S = 1 predicts token i from a mask at its
    own place; they are different functions of the same weights. The mask token has probability
    zero here too. There is no noise: a batch's masked positions are those to predict.
    """

    name = "ar"
    prediction_offset = 1

    def __init__(self, mask_id: int) -> None:
        super().__init__(1, mask_id)
        self._all = NoiseSpec(self.schedule, estimator="full")

    @classmethod
    def from_config(cls, cfg: TrainConfig, mask_id: int) -> Self:
        """A model that is told no noise level, and no noise settings.

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
        """Every position that is scored, with weight 1."""
        return self._all

    def loss(self, model: Transformer, batch: Batch) -> Tensor:
        """Σ of the next-token cross-entropy, in nats."""
        select, weight = whole_tiles(batch)
        features = self._features(model, batch.x0, select, batch.doc_ids)
        return self.head_loss(model, features, flat_targets(batch.x0, select), weight)[0]

    def denoiser(self, model: Transformer, x0: Tensor, doc_ids: Tensor | None) -> Denoiser:
        """One causal forward a call; what is masked and how much does not matter."""

        def denoise(xt: Tensor, select: Tensor, mask_prob: Tensor) -> Tensor:
            return self._features(model, x0, select, doc_ids)

        return denoise

    def _features(
        self, model: Transformer, x0: Tensor, select: Tensor, doc_ids: Tensor | None
    ) -> Tensor:
        """Features that predict the selected positions: those one before.

        Position 0 of a row or a document is a BOS and never selected, so there always is one.
        """
        return model.encode(x0, 1, select=select - self.prediction_offset, doc_ids=doc_ids)
