"""Noise that training learns: the distribution of masked counts, and token rarity.

Source: docs/math.md §6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EVERY = 50
"""Optimizer steps between two fits; prefetched batches keep the noise they were made with."""
DECAY = 0.99
"""Decay of the moving averages per step."""
UNIFORM = 0.1
"""Share of the uniform distribution, so that every count keeps being drawn."""


class CountDistribution:
    """Distribution q(k) of masked counts, fitted for least variance of the loss.

    ``q̂(k) ∝ √E[(Y_k/k)²]``, where Y_k is the cross-entropy of a block with k masked tokens. The
    expectations are moving sums divided by the moving number of blocks, hence without bias
    towards their start. They stay on the device between two fits.

    Args:
        block_size: S.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.probs: list[float] | None = None
        self.observed: Tensor | None = None
        """Sums of (Y_k/k)² and numbers of blocks, of this step, float32 [2, S+1]; on many ranks
        they are added up before the update."""
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
            if self.observed is None:
                self.observed = torch.zeros(2, self.block_size + 1, device=nats.device)
            self.observed[0].index_add_(0, count.long(), square)
            self.observed[1].index_add_(0, count.long(), finite.float())

    def update_noise_after_step(self, step: int) -> bool:
        """Add this step's sums, if there are any, and refit q every :data:`EVERY` steps.

        Returns:
            Whether q changed.
        """
        added, sums = self.observed, self._sums
        if added is not None:
            sums = added + (0.0 if sums is None else sums.to(added.device))
            self._sums, self.observed = sums * DECAY, None
        if sums is None or step % EVERY:
            return False
        self.probs = fitted(*sums[:, 1:].double().cpu().numpy())
        return True

    def state(self) -> dict[str, Any]:
        """Averages and q as plain JSON."""
        sums = None if self._sums is None else self._sums.double().tolist()
        return {"probs": self.probs, "sums": sums}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`, bit for bit: every float32 is a float64."""
        self.probs = state["probs"]
        self._sums = None if state["sums"] is None else torch.tensor(state["sums"])


def fitted(squares: NDArray[np.float64], seen: NDArray[np.float64]) -> list[float]:
    """Fit q(k) for k = 1..S from sums of (Y_k/k)² and the numbers of blocks.

    Counts without blocks get the mean of the others.

    Examples:
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
    """Exponent γ of every token: 1 + gap for the commonest down to 1 - gap for the rarest.

    Tokens that occur are ranked; those that never do count as the rarest (docs/math.md §6).

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
