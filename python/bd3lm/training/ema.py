"""The weight average that is evaluated, sampled and saved (docs/math.md §1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bd3lm.training.adapters import trained_parameters
from bd3lm.training.shards import local


class Ema:
    """Exponential moving average of a model's parameters, frozen ones left out, in float32.

    The decay after n updates is ``min(decay, (1+n)/(10+n))``, so that short runs average over
    their own length and not over their initialisation.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = trained_parameters(model)
        self.weights = {name: p.detach().clone().float() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [local(p) for p in self._parameters.values()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [local(average) for average in self.weights.values()], current, 1.0 - decay
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model hold the average inside the block, its own weights after it."""
        own: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            own[name] = parameter.data
            parameter.data = self.weights[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]
