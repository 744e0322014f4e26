"""Sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bd3lm.config.check import check


@dataclass(frozen=True)
class SampleConfig:
    """Settings of the sampler (docs/math.md §8)."""

    num: int = 1
    """Samples of each prompt."""
    length: int | None = None
    """Largest number of tokens, prompt and BOS included. None: the trained length."""
    steps: int | None = None
    """None: first hitting, one forward a token. N: ancestral sampling on a grid of N levels a
    block; sedd always samples on a grid, by default of seq_len levels."""
    tokens_per_forward: int = 1
    """First hitting: tokens that one forward reveals. More than 1 is faster and not exact, because
    tokens of one forward do not see each other."""
    order: Literal["random", "confidence"] = "random"
    """Positions that a forward reveals: in the random order of first hitting, or those of the most
    probable tokens, as serving engines decode."""
    threshold: float | None = None
    """Parallel decoding: each forward also reveals every position whose most probable token has at
    least this probability. With order = random, 1 is plain first hitting."""
    entropy_bound: float | None = None
    """Parallel decoding: each forward also reveals the positions of lowest entropy, as long as
    their entropies without the largest sum to at most this many nats."""
    top_p: float = 0.9
    """Nucleus sampling; 1 samples from the whole distribution."""
    top_k: int | None = None
    """Only the k most probable tokens. None: all."""
    temperature: float = 1.0
    """0 is greedy."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens already in the row, multiplies negative ones; 1: off."""
    forbidden: tuple[int, ...] = ()
    """Token ids that are never drawn."""
    seed: int = 1
    """Seed of the samples."""

    def __post_init__(self) -> None:
        check(self.num >= 1, "num", self.num, "at least 1")
        check(
            self.length is None or self.length >= 2,
            "length",
            self.length,
            "at least 2 (BOS and one token)",
        )
        check(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1")
        per = self.tokens_per_forward
        check(per >= 1, "tokens-per-forward", per, "at least 1")
        check(
            self.threshold is None or 0 < self.threshold <= 1,
            "threshold",
            self.threshold,
            "in (0, 1]",
        )
        bound = self.entropy_bound
        check(bound is None or bound >= 0, "entropy-bound", bound, "0 or more")
        ways = [self.steps is not None, per > 1, self.threshold is not None, bound is not None]
        check(
            sum(ways) <= 1,
            "steps, tokens-per-forward, threshold, entropy-bound",
            "several",
            "one at a time",
        )
        check(
            self.steps is None or self.order == "random",
            "steps",
            self.steps,
            "None with order = confidence, which has no levels",
        )
        check(0 < self.top_p <= 1, "top-p", self.top_p, "in (0, 1]")
        check(self.top_k is None or self.top_k >= 1, "top-k", self.top_k, "at least 1")
        check(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        penalty = self.repetition_penalty
        check(penalty > 0, "repetition-penalty", penalty, "greater than 0")

    @property
    def adaptive(self) -> bool:
        """Whether the model decides which positions, and how many, a forward reveals."""
        sure = self.threshold is not None or self.entropy_bound is not None
        return sure or self.order == "confidence"
