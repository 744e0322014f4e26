"""What training learns about its own noise (MATH §6): the law of counts, and token rarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EVERY = 50
"""Optimizer steps between two laws: a batch's noise is fixed long before it is drawn."""
DECAY = 0.99
"""Of the moving averages, a step."""
UNIFORM = 0.1
"""Share of the uniform law, so that every count goes on being seen."""


class CountLaw:
    """q(k) of the ``count`` estimator, fitted to the losses seen: least variance of the loss.

    ``q̂(k) ∝ √E[(Y_k/k)²]``, Y_k the cross-entropy of a block with k masked tokens, by moving
    averages that are divided by the moving number of blocks seen, so that they have no bias
    towards their start. Averages stay on the device between the steps at which q changes.

    Args:
        block_size: S.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.probs: list[float] | None = None
        self._sums: Tensor | None = None

    def observe(self, nats: Tensor, masked: Tensor, blocks: int) -> None:
        """Add the losses of a batch.

        Args:
            nats: unweighted loss of each masked position, [M].
            masked: their flat positions b·L+i, int64 [M].
            blocks: B·K.
        """
        with torch.no_grad():
            block = masked // self.block_size
            total = nats.new_zeros(blocks, dtype=torch.float32).index_add_(0, block, nats.float())
            count = torch.zeros_like(total).index_add_(0, block, torch.ones_like(nats.float()))
            square = (total / count.clamp(min=1)) ** 2
            finite = square.isfinite()  # the trainer skips a step whose loss is not
            square = torch.where(finite, square, 0.0)
            if self._sums is None:
                self._sums = torch.zeros(2, self.block_size + 1, device=nats.device)
            self._sums = self._sums.to(nats.device)  # after a resume
            self._sums[0].index_add_(0, count.long(), square)
            self._sums[1].index_add_(0, count.long(), finite.float())

    def update_noise_after_step(self, step: int) -> bool:
        """After a step: let the averages fade; every so often a new q. Returns whether it is."""
        if self._sums is None:
            return False
        if step % EVERY == 0:
            self.probs = fitted(*self._sums[:, 1:].double().cpu().numpy())
        self._sums *= DECAY
        return step % EVERY == 0

    def state(self) -> dict[str, Any]:
        """As plain JSON."""
        sums = None if self._sums is None else self._sums.double().tolist()
        return {"probs": self.probs, "sums": sums}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`, bit for bit: every float32 is a float64."""
        self.probs = state["probs"]
        self._sums = None if state["sums"] is None else torch.tensor(state["sums"])


def fitted(squares: NDArray[np.float64], seen: NDArray[np.float64]) -> list[float]:
    """q(k) for k = 1..S from Σ (Y_k/k)² over the blocks seen with that count, and their number.

    Counts that were not seen get the others' mean.

    >>> [round(x, 3) for x in fitted(np.array([4.0, 1.0]), np.array([1.0, 1.0]))]
    [0.65, 0.35]
    """
    known = seen > 0
    if not known.any():
        return [1.0 / len(seen)] * len(seen)
    root = np.sqrt(squares / np.where(known, seen, 1.0))
    root = np.where(known, root, root[known].mean())
    if root.sum() == 0:
        return [1.0 / len(seen)] * len(seen)
    return ((1 - UNIFORM) * root / root.sum() + UNIFORM / len(seen)).tolist()


def rarity_exponents(counts: NDArray[np.uint64], gap: float) -> NDArray[np.float32]:
    """γ of every token: from 1 + gap for the commonest down to 1 - gap for the rarest (MATH §6).

    Ranks are over the tokens that occur; one that never does counts as the rarest.

    Args:
        counts: occurrences of each id [V].
        gap: g in [0, 1).

    Returns:
        float32 [V].
    """
    occurs = counts > 0
    gamma = np.full(len(counts), 1.0 - gap)
    order = np.argsort(-counts[occurs].astype(np.int64), kind="stable")
    gamma[np.flatnonzero(occurs)[order]] = np.linspace(1.0 + gap, 1.0 - gap, int(occurs.sum()))
    return gamma.astype(np.float32)
