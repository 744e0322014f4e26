"""Interface between a system and the trainer, the evaluator and the sampler."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.config import TrainConfig
from bd3lm.data import Batch, Dataset, NoiseSpec, Schedule
from bd3lm.data.store import TokenArrays
from bd3lm.model import HeadInputs, Transformer, head_cross_entropy
from bd3lm.model.adaptive import adaptive_cross_entropy
from bd3lm.systems.parts import LossParts

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(xt [B, L], select [M], mask_prob [B, K]) -> features [M, D]`` of the selected positions; the
level is read by time-conditioned models alone."""

Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(xt [B, L], select [M], mask_prob [B, K]) -> nats [M]``: -log p(x0) at the selected positions,
or an upper bound on it."""

MAX_SIGMA = -math.log(1e-3)
"""Largest sigma given to a network, as in the original implementation; the loss weight is not
capped (docs/math.md §5)."""


class System(ABC):
    """A way to train and score a :class:`Transformer`: its noise, its loss, its likelihood.

    Args:
        block_size: S.
        mask_id: id of the mask token, whose probability is zero.
        schedule: p(t) and w(t) of its levels; None: loglinear.
    """

    name: ClassVar[str]
    """Value of ``system`` in the settings."""
    prediction_offset: ClassVar[int] = 0
    """1 if the features at position i-1 predict token i (AR), 0 if those at i do."""

    unnormalized_scores: ClassVar[bool] = False
    """True if scores need not sum to one. An ancestral step then reads their sum to decide how many
    positions it reveals."""

    chunked_loss: ClassVar = staticmethod(head_cross_entropy)
    """Loss of the head, chunk by chunk: :func:`head_cross_entropy` or the score entropy."""

    def __init__(self, block_size: int, mask_id: int, schedule: Schedule | None = None) -> None:
        self.block_size = block_size
        self.mask_id = mask_id
        self.schedule = schedule or Schedule("loglinear")
        self.parts = LossParts()
        """Losses of the parts of the objective, where there are several."""

    @classmethod
    @abstractmethod
    def from_config(cls, cfg: TrainConfig, mask_id: int) -> Self:
        """Build the system of a run.

        Raises:
            ConfigError: settings that this system cannot have.
        """

    def shifts(self, model: Transformer) -> bool:
        """Return whether the token of a noised position is predicted from the one before it."""
        return model.cfg.token_shift and self.prediction_offset == 0

    @abstractmethod
    def noise(self, step: int) -> NoiseSpec:
        """Noise that the loader draws for the batch of this step."""

    def fit_to_data(self, data: Dataset | TokenArrays) -> None:
        """Read statistics of the training text that the noise needs, before the first step."""

    def observations(self) -> Tensor | None:
        """Sums over the blocks of this step, which ranks add up before the noise is updated.

        None: nothing is learned from losses.
        """
        return None

    def update_noise_after_step(self, step: int) -> None:
        """Update the noise of later steps from the measurements of ``step`` optimizer steps."""

    def set_clip(self, clip: tuple[float, float] | None) -> None:
        """Restrict noise levels to this clip from the next step on; None: all levels."""

    @property
    def count_probs(self) -> NDArray[np.float64] | None:
        """Distribution q(k) of masked counts, k = 1..S; None if levels are drawn instead."""
        return None

    def state(self) -> dict[str, Any]:
        """Learned noise (:meth:`update_noise_after_step`, :meth:`set_clip`) as plain JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""

    @abstractmethod
    def loss(self, model: Transformer, batch: Batch) -> Tensor:
        """Sum of weight·nats over the batch; the trainer divides by all noisable tokens."""

    def head_loss(
        self, model: Transformer, features: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of weight·loss, and the loss of every position [M], from features [M, D]."""
        head = model.head
        inputs = HeadInputs(features, head.weight, head.bias, target, weight, self.mask_id)
        if model.clusters is not None:
            return adaptive_cross_entropy(inputs, model.clusters, model.cutoffs)
        return self.chunked_loss(inputs)

    def nats(self, model: Transformer, features: Tensor, x0: Tensor, select: Tensor) -> Tensor:
        """Unweighted loss of the selected positions [M], from their features [M, D]."""
        target = flat_targets(x0, select)
        weight = torch.ones_like(target, dtype=torch.float32)
        return self.head_loss(model, features, target, weight)[1]

    @abstractmethod
    def denoiser(self, model: Transformer, x0: Tensor, doc_ids: Tensor | None) -> Denoiser:
        """Prepare clean rows for forwards of many noised versions of them (docs/math.md §4).

        Args:
            model: in evaluation mode.
            x0: clean ids [B, L].
            doc_ids: int32 [B, L] or None.
        """

    def scorer(self, model: Transformer, x0: Tensor, doc_ids: Tensor | None) -> Scorer:
        """Score noised versions of clean rows; arguments as of :meth:`denoiser`."""
        denoise = self.denoiser(model, x0, doc_ids)

        def score(xt: Tensor, select: Tensor, mask_prob: Tensor) -> Tensor:
            return self.nats(model, denoise(xt, select, mask_prob), x0, select)

        return score

    def preparing_forwards(self, seq_len: int) -> int:
        """Number of forwards that :meth:`denoiser` runs before the first noised version."""
        return 0

    def logits(self, model: Transformer, features: Tensor) -> Tensor:
        """Unnormalised log-probabilities [R, V] to draw tokens from; the mask token has -inf."""
        return model.logits(features, self.mask_id)

    def level_grid(self, steps: int) -> NDArray[np.float64]:
        """Mask probabilities of N ancestral steps, from 1 down to 0: float64 [N+1].

        ``p(t_i)`` with ``t_i = 1 - i/N``, and ``p(t_N) = 0`` (docs/math.md §8).
        """
        grid = self.schedule.mask_prob(np.linspace(1.0, 0.0, steps + 1)[:-1])
        return np.append(grid, 0.0)

    def reveal_mass(self, logits: Tensor) -> Tensor:
        """Total score of an ancestral step, float64 [R]: 1 unless :attr:`unnormalized_scores`."""
        return torch.ones(logits.shape[0], dtype=torch.float64, device=logits.device)


def sigma_of(mask_prob: Tensor) -> Tensor:
    """-log(1 - p), capped for the network that reads it."""
    return (-torch.log1p(-mask_prob.double())).clamp(max=MAX_SIGMA).float()


def flat_targets(x0: Tensor, select: Tensor) -> Tensor:
    """Clean ids at flat positions b*L+i, int64 [M]; further views of the rows follow the rows."""
    return torch.take(x0, select % x0.numel())
