"""Training objective: which losses are added up, and over which positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bd3lm.config.check import check_number


@dataclass(frozen=True)
class ObjectiveConfig:
    """Losses of a bd3lm run beside that of its noised stream."""

    ar_weight: float = 0.0
    """Weight of the next-token loss on the clean stream, per token. More than 0 needs
    model.clean-stream = causal."""
    ar_tokens: Literal["all", "unmasked"] = "all"
    """Tokens of that loss: all, or those that the noised stream does not predict in this step,
    weighted to the same expectation. The head then works on each token once."""

    def __post_init__(self) -> None:
        check_number("objective.ar-weight", self.ar_weight, 0)
