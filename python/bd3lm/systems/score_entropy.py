"""Score entropy discrete diffusion with absorbing noise, over the whole row (docs/math.md §5)."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from bd3lm.config import TrainConfig, check
from bd3lm.model import head_score_entropy
from bd3lm.systems.block_diffusion import BlockDiffusion


class ScoreEntropy(BlockDiffusion):
    """SEDD: a time-conditioned network that predicts ratios of probabilities.

    The raw output at a masked position means the ratio
    ``p_t(y) / p_t(mask) = e^{raw_y} / (V-1) · (1-p)/p``. If the e^{raw_y} / (V-1) sum to one, they
    are the token's distribution and the loss equals MDLM's; otherwise it is larger.
    """

    name = "sedd"
    unnormalized_scores = True
    chunked_loss = staticmethod(head_score_entropy)

    @classmethod
    def from_config(cls, cfg: TrainConfig, mask_id: int) -> Self:
        """Build the system; the model must be time-conditioned.

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

    def reveal_mass(self, logits: Tensor) -> Tensor:
        """Sum of e^{raw_y} / (V-1) over all tokens y but the mask, float64 [R].

        An analytic (Tweedie) step from level p to p' reveals y with probability
        ``e^{raw_y} / (V-1) · (p-p')/p``: the ancestral step of MDLM times this sum.
        """
        others = math.log(logits.shape[-1] - 1)
        return (torch.logsumexp(logits, dim=-1).double() - others).exp()
