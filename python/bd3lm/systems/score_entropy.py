"""Score entropy discrete diffusion with absorbing noise, over the whole row (MATH §5)."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from bd3lm.config import TrainConfig, check
from bd3lm.model import Transformer, head_score_entropy
from bd3lm.systems.block_diffusion import BlockDiffusion


class ScoreEntropy(BlockDiffusion):
    """SEDD: the network gives ratios of probabilities, and is told the noise level.

    The network's raw output at a masked position stands for the ratio
    ``p_t(y) / p_t(mask) = e^{raw_y} / (V-1) · (1-p)/p``. Where the e^{raw_y} / (V-1) sum to one
    they are the distribution of the token and the loss is MDLM's; elsewhere it is larger.
    """

    name = "sedd"
    unnormalized_scores = True

    @classmethod
    def from_config(cls, cfg: TrainConfig, mask_id: int) -> Self:
        """As for block diffusion; the model has to be told the noise level.

        Raises:
            ConfigError: a model without time conditioning.
        """
        check(
            cfg.model.time_conditioning,
            "model.time-conditioning",
            cfg.model.time_conditioning,
            "True for system = sedd, with model.cond-width > 0: its ratios depend on the level",
        )
        return super().from_config(cfg, mask_id)

    def head_loss(
        self, model: Transformer, features: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Σ weight·(score entropy) and every position's, from features [M, D]."""
        head = model.head
        return head_score_entropy(features, head.weight, head.bias, target, weight, self.mask_id)

    def reveal_mass(self, logits: Tensor) -> Tensor:
        """Σ_y e^{raw_y} / (V-1) over tokens other than the mask, float64 [R].

        An analytic (Tweedie) step from level p to p' reveals y with probability
        ``e^{raw_y} / (V-1) · (p-p')/p``: the ancestral step of a subs model times this mass.
        """
        others = math.log(logits.shape[-1] - 1)
        return (torch.logsumexp(logits, dim=-1).double() - others).exp()
