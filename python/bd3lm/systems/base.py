"""What the trainer, the evaluator and the sampler ask of a system; they never ask its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from bd3lm.data import Batch, NoiseSpec
from bd3lm.model import Transformer

Scorer = Callable[[Tensor, Tensor], Tensor]
"""``(xt [B, L], select [M]) -> nll [M]``: -log p(x0) in nats at the selected positions."""


class System(ABC):
    """One way to train and score a :class:`Transformer`: its noise, its loss, its likelihood.

    Args:
        block_size: S.
        mask_id: id of the mask token, whose probability is zero.
    """

    name: ClassVar[str]

    def __init__(self, block_size: int, mask_id: int) -> None:
        self.block_size = block_size
        self.mask_id = mask_id

    @abstractmethod
    def noise(self, step: int) -> NoiseSpec:
        """What the loader draws for the batch of this step."""

    @abstractmethod
    def loss(self, model: Transformer, batch: Batch) -> Tensor:
        """Σ weight·nats over the batch; the trainer divides by the global noisable count."""

    @abstractmethod
    def scorer(self, model: Transformer, x0: Tensor, doc_ids: Tensor | None) -> Scorer:
        """Prepare clean rows for scoring many noised versions of them (MATH §4).

        Args:
            model: in evaluation mode.
            x0: clean ids [B, L].
            doc_ids: int32 [B, L] or None.
        """


def flat_targets(x0: Tensor, select: Tensor) -> Tensor:
    """True ids at flat positions b*L+i, int64 [M]."""
    return torch.take(x0, select)
