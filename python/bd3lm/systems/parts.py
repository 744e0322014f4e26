"""Losses of the parts of an objective, for the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LossParts:
    """Mean loss of every part since it was last read, in nats a token.

    Sums stay on the device; reading them is one transfer.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, nats: Tensor, tokens: int) -> None:
        """Add a sum of nats over so many tokens; sums that are not finite are left out.

        Args:
            name: of the part, as it is logged.
            nats: a scalar.
            tokens: noisable or predicted tokens.
        """
        nats = nats.detach().double()
        both = torch.stack([nats, torch.full_like(nats, tokens)])
        both = torch.where(nats.isfinite(), both, 0.0)
        known = self._sums.get(name)
        self._sums[name] = both if known is None else known.to(both.device) + both

    def read(self, over_ranks: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        """Mean of each part, and begin anew; parts without a token are left out.

        Args:
            over_ranks: adds a tensor over all ranks, which have the same parts.
        """
        if not self._sums:
            return {}
        sums = over_ranks(torch.stack(list(self._sums.values()))).tolist()
        named = dict(zip(self._sums, sums, strict=True))
        self._sums = {}
        return {name: nats / tokens for name, (nats, tokens) in named.items() if tokens}

    def collect(self, over_ranks: Callable[[Tensor], Tensor], *, first: bool) -> None:
        """Move the sums of all ranks to the first, before its state is saved."""
        if self._sums:
            total = over_ranks(torch.stack(list(self._sums.values())))
            self._sums = dict(zip(self._sums, total if first else total * 0, strict=True))

    def state(self) -> dict[str, Any]:
        """Sums as plain JSON."""
        return {name: both.tolist() for name, both in self._sums.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`, bit for bit."""
        self._sums = {name: torch.tensor(both, dtype=torch.float64) for name, both in state.items()}
